"""RazorAttention: heads that do not retrieve drop what is remote, and keep its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tamis.methods.base import Heads, param
from tamis.methods.heads.fitted import choosable, load_scores, top_heads
from tamis.methods.views import ModelShape


@dataclass(frozen=True)
class RazorAttention(Heads):
    """Retrieval heads keep all tokens; the others the first and recent ones, and one token that
    stands for what they dropped.

    A probe of repeated random tokens (`tamis train razorattention`) scores every head: its *echo*
    score is the attention to earlier occurrences of the same token, its *induction* score that to
    the tokens after them (RazorAttention for RoPE models). The share `induction` of highest
    induction scores and the share `echo` of highest echo scores are retrieval heads. The others
    keep `sinks` first tokens and, of a prompt of N tokens, max(`buffer`, N / `ratio`) recent ones
    (algorithm 1); the rest is replaced, after the prompt, by a compensation token with their mean
    key and value, counted as often as there were. Paper defaults: 14 % induction and 1 % echo
    heads, 4 sinks, a buffer of at least 4000 tokens and a fifth of the prompt.

    Departures. With GQA a KV head has the highest scores of its query heads, and shares are of KV
    heads, rounded up. The buffer does not grow with generated tokens. Layers with a sliding window
    stay as the model has them. The paper's rule for ALiBi models is not here: positions are RoPE.
    """

    paper = (
        "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv:2407.15891)"
    )
    compensate = True

    induction: float = param(0.14, "share of induction heads that stay full", minimum=0, maximum=1)
    echo: float = param(0.01, "share of echo heads that stay full", minimum=0, maximum=1)
    sinks: int = param(4, "first tokens that the other heads keep", minimum=0)
    buffer: int = param(4000, "recent tokens that they keep at least", minimum=1)
    ratio: float = param(5.0, "prompt tokens per recent token that they keep", minimum=1)
    path: str = param("", "file of the scores; empty: where `tamis train razorattention` writes it")

    def streaming(self, shape: ModelShape) -> list[Tensor]:
        scores = load_scores(self, self.path, shape, ("induction", "echo"))
        among = choosable(shape)
        retrieval = ~among
        for score, share in zip(scores, (self.induction, self.echo), strict=True):
            retrieval = retrieval | top_heads(score, among, _at_least(share, int(among.sum())))
        return [~retrieval[i, : layer.kv_heads] for i, layer in enumerate(shape.layers)]

    def span(self, prompt_tokens: int) -> tuple[int, int]:
        return self.sinks, max(self.buffer, int(prompt_tokens / self.ratio))


def _at_least(share: float, count: int) -> int:
    """The smallest number that is at least `share` of `count`, rounding errors forgiven."""
    return math.ceil(share * count - 1e-9)
