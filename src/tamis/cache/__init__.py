"""The KV cache: pages of single heads, and everything that moves them.

A *page* holds `page_size` tokens of one KV head of one layer, field after field (`format.py`). A
`Tier` is one memory with its pages of all formats: an `Arena` of bytes, and a `PagePool` per
format that hands pages out, counts references and bytes. `PagedCache` owns the device's tier and
the host's, and makes sequences. A `SequenceCache` has, for every *row* (one KV head of one layer),
a page table and a length, so heads and layers may differ in length; positions lie in the pages.
`BatchView` gathers the tables of one step's batch for the attention callback.

The life of a step, for every sequence of a batch:

    sequence.reserve(n)                   # pages for n tokens, or OutOfPages and no change
    batch = BatchView(cache, sequences, new_tokens, positions)
    batch.append(layer, k, v)             # per layer: write the new tokens
    batch.pages(layer, start, stop, with_new=True)   # per layer: what attention reads
    CommonPrefix.of(batch, n, least)      # what some of them share, to be read once
    sequence.advance(n)                   # count them
    sequence.trim()                       # drop what fell out of a window

`reserve` and `advance` take a range of layers where tokens pass through some layers only.

Between steps `keep` evicts, `take_out` does so for single tokens without moving the others,
`retract` takes back rejected drafts, `fork` shares, `swap_out` and `swap_in` move a sequence to
host memory and back (`HostCopies` keeps what was copied, so that it need not be copied again;
between a GPU and the host, `Transfers` copies beside its work), and `free` ends it. `keys_values`,
`positions_of` and `write` read and overwrite cached tokens. Three places hold what a method adds:

- *side columns*, fields of the live pages with a row per token (`column`, `set_column`,
  `accumulate`): they are kept, shared and swapped with their tokens, and zero for new ones;
- *summaries*, fields of the live pages with rows per page (`summaries`, `set_summaries`): they go
  with their page, and `keep` and `retract` return the first page whose tokens changed;
- *stores* (`add_store`, `put`, `stored`, `store_pages`): pages beside the live ones, of any format,
  on the device or in host memory, written once and shared between layers and forks by reference.

A `PrefixTree` outlives sequences: it keeps the full pages that they computed, for those that begin
with the same tokens.

None of these decides anything: that is for their callers. Writing to a page that is shared with a
fork copies it first.

`OutOfPages` and `OutOfSwap` tell a scheduler to make room; `PageError` is a bug in the caller.
"""

from tamis.cache.arena import Arena
from tamis.cache.batch import BatchView
from tamis.cache.common import CommonPrefix, worth_sharing
from tamis.cache.copies import OutOfSwap
from tamis.cache.fixed import FixedBatch, FixedStores
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.cache.layout import CacheLayout, LayerShape
from tamis.cache.paged import PagedCache
from tamis.cache.pool import OutOfPages, PageError, PagePool
from tamis.cache.prefix import Block, PrefixTree
from tamis.cache.sequence import SequenceCache
from tamis.cache.store import Store, together
from tamis.cache.tier import Tier

__all__ = [
    "Arena",
    "BatchView",
    "Block",
    "CacheLayout",
    "CommonPrefix",
    "Field",
    "FixedBatch",
    "FixedStores",
    "LayerShape",
    "OutOfPages",
    "OutOfSwap",
    "PageError",
    "PageFormat",
    "PagePool",
    "PagedCache",
    "PagedKV",
    "PrefixTree",
    "SequenceCache",
    "Store",
    "Tier",
    "together",
    "worth_sharing",
]
