"""Statistics of attention that methods ask for: weights, scores and sums, never an N x N matrix.

Query head `h` reads KV head `h // (q_heads // kv_heads)`. The score of a query and a key is
softcap tanh(scale q k^T / softcap), without `softcap` scale q k^T, and its weight is
exp(score - lse) with the log-sum-exp of all that the query sees, sinks included. A query at
position `p` sees the cached tokens whose position, as their page holds it, is at most `p` and, with
a window `w`, greater than p - w. Everything returned is fp32. A result per cached token has
`max_len` columns, the length of the longest head: column `i` is token `i` of the head, and what a
query does not see, or a head does not have, is zero (scores: -inf).
"""

from tamis.attention.observe_blocks import bound_scores, page_bounds, pooled
from tamis.attention.observe_chunk import column_sums, window_weights
from tamis.attention.observe_decode import decode_weights, partial_scores
from tamis.attention.observe_pages import top_pages
from tamis.attention.observe_tokens import token_weights, top_tokens

__all__ = [
    "bound_scores",
    "column_sums",
    "decode_weights",
    "page_bounds",
    "partial_scores",
    "pooled",
    "token_weights",
    "top_pages",
    "top_tokens",
    "window_weights",
]
