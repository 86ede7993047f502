"""What must hold of the copies in host memory, whoever made them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from tamis.cache import PagedCache


def check(cache: PagedCache, held: list[Counter[int]]) -> None:
    """Every copy is what its pages are, and has as many references as there are links and holders.

    Args:
        cache: whose.
        held: per pool how often each page of host memory is held.
    """
    copies = cache.copies
    for of_pool, pages in zip(copies._pools, held, strict=True):
        slots = np.flatnonzero(of_pool._copy >= 0).astype(np.int32)
        linked = of_pool._copy[slots]
        assert of_pool.n_linked == slots.size
        ids = of_pool.pool._ids(slots)
        assert torch.equal(of_pool.pool.read(ids), of_pool.host.read(linked))
        references = pages + Counter(linked.tolist())
        host = np.array(list(references), dtype=np.int32)
        assert of_pool.host.references(host).tolist() == list(references.values())
        assert of_pool.host.bytes_in_use == len(references) * of_pool.host.page_bytes
