"""How much of the copies between a GPU and host memory runs beside its work, for `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from gpu_pages import PAGE_SIZE
from gpu_times import Item, Sizes
from tamis.attention import decode
from tamis.cache import CacheLayout, LayerShape, PagedCache, PagedKV, PageFormat, SequenceCache
from tamis.cache.transfers import Transfers

DIM, LAYERS = 128, 4
PRODUCTS = 16
"""Products of square matrices beside a swap."""


def items(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], Item]]]:
    """What is timed. Of each the run "tamis" is the copies beside the work, "copies" and "work" are
    either alone."""
    yield "swap out and in", partial(_swap, sizes, device)
    yield "pages in host memory", partial(_host_pages, sizes, device)


def _swap(sizes: Sizes, device: str) -> Item:
    """A sequence that fills `sizes.swapped` bytes gives its pages up, which come back."""
    cache, n_tokens = _cache(sizes, device)
    sequence = cache.new_sequence()
    sequence.reserve(n_tokens)
    sequence.advance(n_tokens)
    square = _square(sizes, device)

    def work() -> None:
        for _ in range(PRODUCTS // 2):
            square @ square

    def swap(between: Callable[[], None]) -> None:
        cache.copies.clear()  # or nothing would be copied the second time
        sequence.swap_out()
        between()
        sequence.swap_in(beside=True)
        between()
        cache.arrive()

    runs = {
        "tamis": partial(swap, work),
        "copies": partial(swap, lambda: None),
        "work": lambda: (work(), work()),
        "torch, pinned": _plain_copies(sequence.bytes, device),
    }
    settings = {"bytes": sequence.bytes, "tokens": n_tokens, "products": PRODUCTS}
    return Item(settings | {"square": len(square)}, runs, moved=4 * sequence.bytes)


def _host_pages(sizes: Sizes, device: str) -> Item:
    """Layers that read their pages from host memory, the next one's on their way or not."""
    cache, n_tokens = _cache(sizes, device)
    transfers, heads = cache.transfers, sizes.kv_heads
    assert transfers is not None
    format = PageFormat.dense(PAGE_SIZE, DIM, DIM, torch.bfloat16)
    sequence = cache.new_sequence()
    sequence.add_store("host", dict.fromkeys(range(LAYERS), format), "host")
    _fill(sequence, n_tokens, heads, device)
    store = sequence.stores["host"]
    square = _square(sizes, device)
    q = torch.randn(1, 4 * heads, DIM, device=device).bfloat16()
    laid = [store.laid_out(layer) for layer in range(LAYERS)]
    rows = [[torch.from_numpy(part).to(device) for part in of_layer[1:]] for of_layer in laid]
    there = [store.staged(layer, torch.device(device)) for layer in range(LAYERS)]

    def begin(layer: int) -> Callable[[], torch.Tensor]:
        return transfers.ahead(store.pool(store.rows(layer)), laid[layer][0])

    def read(kv: PagedKV) -> None:
        decode(q, kv, scale=DIM**-0.5, backend="triton")
        square @ square

    def ahead(use: Callable[[PagedKV], None]) -> None:
        coming = begin(0)
        for layer in range(LAYERS):
            arrive = coming
            if layer + 1 < LAYERS:
                coming = begin(layer + 1)
            use(PagedKV(arrive(), format, *rows[layer]))

    def in_turn() -> None:
        for layer in range(LAYERS):
            read(store.staged(layer, torch.device(device)))

    def work() -> None:
        for kv in there:
            read(kv)

    runs = {
        "tamis": partial(ahead, read),
        "copies": partial(ahead, lambda kv: None),
        "work": work,
        "tamis, one after the other": in_turn,
    }
    settings = {"layers": LAYERS, "bytes": store.bytes, "tokens": n_tokens, "square": len(square)}
    return Item(settings, runs, moved=2 * store.bytes)


def _cache(sizes: Sizes, device: str) -> tuple[PagedCache, int]:
    """A cache for one sequence that fills `sizes.swapped` bytes, with as much host memory of either
    kind, and the sequence's tokens."""
    layout = CacheLayout(
        (LayerShape(sizes.kv_heads, DIM, DIM),) * LAYERS, PAGE_SIZE, torch.bfloat16
    )
    n_tokens = sizes.swapped // layout.bytes_for(PAGE_SIZE) * PAGE_SIZE
    room = layout.capacity_for(layout.peak_pages(n_tokens))
    # As of an engine with 16 times as much memory.
    staged = max(2 * layout.block_bytes(room), sizes.swapped)
    transfers = Transfers(torch.device(device), staged)
    return PagedCache(layout, room, device, room, room, transfers), n_tokens


def _fill(sequence: SequenceCache, n_tokens: int, heads: int, device: str) -> None:
    at = torch.arange(n_tokens, dtype=torch.int32, device=device).expand(heads, -1)[..., None]
    for layer in range(LAYERS):
        kv = {x: torch.randn(heads, n_tokens, DIM, device=device).bfloat16() for x in "kv"}
        sequence.put("host", (layer,), n_tokens, kv | {"position": at})


def _square(sizes: Sizes, device: str) -> torch.Tensor:
    return torch.randn(sizes.square, sizes.square, device=device).bfloat16()


def _plain_copies(n_bytes: int, device: str) -> Callable[[], None]:
    """As many bytes out and in, by torch, from one contiguous tensor to another."""
    there = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    here = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device == "cuda")

    def run() -> None:
        here.copy_(there, non_blocking=True)
        there.copy_(here, non_blocking=True)

    return run
