"""Codes are packed plane by plane, and fields mean what an encoding says."""

from __future__ import annotations

import pytest
import torch

from tamis.attention.encoding import (
    Encoding,
    PageEncoding,
    Plain,
    Pruned,
    Quantized,
    pack,
    packed_bytes,
    restore,
    unpack,
)


@pytest.mark.parametrize("n", [1, 24, 40, 64, 257])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_packed_codes_come_back(bits: int, n: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 5, n), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, packed_bytes(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize(("bits", "n_bytes"), [(1, 8), (2, 16), (3, 26), (4, 32), (8, 64)])
def test_bytes_of_64_codes(bits: int, n_bytes: int) -> None:
    assert packed_bytes(64, bits) == n_bytes


def test_one_shift_of_all_words_gives_neighbouring_codes() -> None:
    codes = torch.tensor([3, 1, 0, 2, 1, 1, 2, 3, 0, 0, 3, 2, 1, 0, 2, 3], dtype=torch.uint8)
    words = pack(codes, 2).view(torch.int16).int() & 0xFFFF
    for plane in range(8):
        neighbours = codes[2 * plane : 2 * plane + 2]
        assert ((words >> 2 * plane) & 3).tolist() == neighbours.tolist()


def test_restores_every_part_by_its_definition() -> None:
    torch.manual_seed(0)
    size, dim, rank = 4, 6, 2
    codes = torch.randint(0, 8, (size, dim), dtype=torch.uint8)
    page = {
        "k_codes": pack(codes, 3),
        "k_scale": torch.rand(2, dim),
        "k_zero": torch.randn(2, dim),
        "k_left": torch.randn(size, rank),
        "k_right": torch.randn(rank, dim),
        "k_places": torch.tensor([[23, 2]], dtype=torch.int16),
        "k_outliers": torch.tensor([[100.0, -50.0]]),
        "v_codes": pack(codes, 3),
        "v_scale": torch.rand(size, 3),
        "v_zero": torch.randn(size, 3),
    }
    encoding = PageEncoding(
        Encoding(Quantized(3, 2, "tokens"), low_rank=True, outliers=True),
        Encoding(Quantized(3, 2, "channels")),
    )
    k, v = restore(page, encoding)
    for t in range(size):
        for c in range(dim):
            want = codes[t, c] * page["k_scale"][t // 2, c] + page["k_zero"][t // 2, c]
            want = want + page["k_left"][t] @ page["k_right"][:, c]
            want = want + {23: 100.0, 2: -50.0}.get(t * dim + c, 0.0)
            torch.testing.assert_close(k[t, c], want)
            want = codes[t, c] * page["v_scale"][t, c // 2] + page["v_zero"][t, c // 2]
            torch.testing.assert_close(v[t, c], want)
    assert set(encoding.fields) == set(page)


def test_restores_pruned_channels_as_zeros() -> None:
    page = {
        "k_kept": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "k_mask": torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8),
        "v": torch.ones(2, 3),
    }
    k, v = restore(page, PageEncoding(Encoding(Pruned()), Encoding(Plain())))
    assert k.tolist() == [[0, 1, 0, 2], [0, 3, 0, 4]]
    assert torch.equal(v, page["v"])
