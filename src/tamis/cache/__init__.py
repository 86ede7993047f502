"""The KV cache: pages of single heads, and everything that moves them.

A *page* holds `page_size` tokens of one KV head of one layer (`format.py`). All pages lie in one
`Arena`; a `PagePool` per page format hands them out, counts references and bytes. A
`SequenceCache` has, for every *row* (one KV head of one layer), a page table, a length and the
absolute position of each cached token, so heads and layers may differ in length. `PagedCache`
owns the memory and makes sequences; `BatchView` gathers the tables of one step's batch for the
attention callback.

The life of a step, for every sequence of a batch:

    sequence.reserve(n)                   # pages for n tokens, or OutOfPages and no change
    batch = BatchView(cache, sequences, new_tokens, positions)
    batch.append(layer, k, v)             # per layer: write the new tokens
    batch.pages(layer, start, stop, with_new=True)   # per layer: what attention reads
    sequence.advance(n)                   # count them
    sequence.trim()                       # drop what fell out of a window

Between steps `keep` evicts, `fork` shares, `swap_out` and `swap_in` move a sequence to host
memory and back, and `free` ends it. None of them decides anything: that is for their callers.

`OutOfPages` and `OutOfSwap` tell a scheduler to make room; `PageError` is a bug in the caller.
"""

from tamis.cache.arena import Arena
from tamis.cache.batch import BatchView
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.cache.layout import CacheLayout, LayerShape
from tamis.cache.paged import PagedCache
from tamis.cache.pool import OutOfPages, PageError, PagePool
from tamis.cache.sequence import OutOfSwap, SequenceCache

__all__ = [
    "Arena",
    "BatchView",
    "CacheLayout",
    "Field",
    "LayerShape",
    "OutOfPages",
    "OutOfSwap",
    "PageError",
    "PageFormat",
    "PagePool",
    "PagedCache",
    "PagedKV",
    "SequenceCache",
]
