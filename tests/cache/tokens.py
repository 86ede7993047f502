"""Numbered tokens, so that a test can tell where every cached element came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamis.cache import BatchView, PagedCache, SequenceCache


def keys(serials: Sequence[int], row: int, dim: int) -> torch.Tensor:
    """The key that token number `serial` has in a row, fp32 [tokens, dim]; exact in fp32."""
    serial = torch.tensor(serials, dtype=torch.float32).reshape(-1, 1)
    return (serial * 16 + row) * 16 + torch.arange(dim)


def values(serials: Sequence[int], row: int, dim: int) -> torch.Tensor:
    """The value that token number `serial` has in a row, fp32 [tokens, dim]."""
    return -keys(serials, row, dim)


def append(
    cache: PagedCache,
    sequences: Sequence[SequenceCache],
    serials: Sequence[Sequence[int]],
    layers: range | None = None,
) -> None:
    """Append the numbered tokens to each sequence in one batch; room must be reserved."""
    counts = [len(new) for new in serials]
    positions = [
        torch.arange(sequence.next_position, sequence.next_position + n, dtype=torch.int32)
        for sequence, n in zip(sequences, counts, strict=True)
    ]
    batch = BatchView(cache, sequences, counts, torch.cat(positions))
    flat = [serial for new in serials for serial in new]
    for i in layers or range(len(cache.layout.layers)):
        layer = cache.layout.layers[i]
        rows = range(cache.layout.rows(i).start, cache.layout.rows(i).stop)
        k = torch.stack([keys(flat, row, layer.k_dim) for row in rows], dim=1)
        v = torch.stack([values(flat, row, layer.v_dim) for row in rows], dim=1)
        batch.append(i, k, v)
    for sequence, n in zip(sequences, counts, strict=True):
        sequence.advance(n, layers)


def grow(sequence: SequenceCache, serials: Sequence[int], layers: range | None = None) -> None:
    """Reserve room for the numbered tokens, append them, trim."""
    sequence.reserve(len(serials), layers)
    append(sequence.cache, [sequence], [serials], layers)
    sequence.trim()


def stored(serials: Sequence[int], heads: int) -> dict[str, torch.Tensor]:
    """The numbered tokens as a put into a store of `PageFormat.dense(_, 8, 8, float32)`."""
    return {
        "k": torch.stack([keys(serials, head, 8) for head in range(heads)]),
        "v": torch.stack([values(serials, head, 8) for head in range(heads)]),
        "position": torch.tensor(serials, dtype=torch.int32).expand(heads, -1)[..., None],
    }
