"""Decode over encoded pages equals attention over what they decode to, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamis.attention.encoded import decode_encoded
from tamis.attention.encoding import Encoding, PageEncoding, Plain, Pruned, Quantized
from tamis.attention.narrow import narrowed
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.methods.base import Codec
from tamis.methods.codec.gear import GEAR
from tamis.methods.codec.kivi import KIVI
from tamis.methods.codec.think import ThinK
from tests.attention import naive
from tests.attention.encoded_pages import (
    BACKENDS,
    definition,
    implementation,
    page_format,
    pages,
)
from tests.methods.layer import layer_view

Decode = Callable[..., tuple[Tensor, Tensor]]

PAGE_SIZES = (1, 8, 16, 32, 48, 64, 256)

TOLERANCE = 3e-4
"""Queries and weights meet codes as 16-bit integers: 2^-16 of the largest per product."""


@pytest.fixture(params=BACKENDS, scope="session")
def decode(request: pytest.FixtureRequest) -> Decode:
    """Decode over encoded pages by one backend and instruction set."""
    return implementation(request.param)


@pytest.fixture(params=naive.BACKENDS, scope="session")
def compiled(request: pytest.FixtureRequest) -> Decode:
    """The same without Triton, whose interpreter takes milliseconds for a tile."""
    return implementation(request.param)


@st.composite
def sides(draw: st.DrawFn, name: str, page_size: int, dim: int) -> Encoding:
    """How keys or values of a page are stored."""
    kind = draw(st.sampled_from(["tokens", "channels", "tokens", "channels", "elements"]))
    if kind == "elements":
        rows: Plain | Pruned | Quantized = Plain()
        if name == "k" and draw(st.booleans()):
            rows = Pruned()
    else:
        whole = page_size if kind == "tokens" else dim
        groups = [n for n in (1, 2, 8, 16, 32, whole) if whole % n == 0]
        bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
        rows = Quantized(bits, draw(st.sampled_from(groups)), kind)
    return Encoding(rows, low_rank=draw(st.booleans()), outliers=draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn, most: int = 4, page_sizes: tuple[int, ...] = PAGE_SIZES) -> dict:
    """What describes one call, with at most `most` pages per head; `build` makes its tensors."""
    n, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, most), min_size=kv_heads, max_size=kv_heads)
    page_size = draw(st.sampled_from(page_sizes))
    k_dim = draw(st.sampled_from([32, 40, 64, 80, 128, 256]))
    v_dim = draw(st.sampled_from([k_dim, 32, 64, 96]))
    return {
        "counts": draw(st.lists(heads, min_size=n, max_size=n)),
        "group": draw(st.integers(1, 9)),
        "page_size": page_size,
        "k_dim": k_dim,
        "v_dim": v_dim,
        "encoding": PageEncoding(
            draw(sides("k", page_size, k_dim)), draw(sides("v", page_size, v_dim))
        ),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict) -> tuple[Tensor, PagedKV, PageEncoding, dict]:
    """Queries, pages, their encoding and options of a case."""
    torch.manual_seed(case["seed"])
    dims = case["k_dim"], case["v_dim"]
    format = page_format(case["encoding"], case["page_size"], *dims, case["dtype"])
    kv = pages(case["encoding"], format, *dims, case["counts"])
    q_heads = len(case["counts"][0]) * case["group"]
    q = torch.randn(len(case["counts"]), q_heads, case["k_dim"]).to(case["dtype"])
    options = {"scale": 0.3 * case["k_dim"] ** -0.5, "softcap": case["softcap"]}
    return q, kv, case["encoding"], options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(compiled: Decode, case: dict) -> None:
    check(compiled, case)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(most=2, page_sizes=PAGE_SIZES[:-1]))
def test_triton_equals_the_definition(case: dict) -> None:
    check(implementation("triton"), case)


def check(decode: Decode, case: dict) -> None:
    """Fail unless a case's result is what the definition gives."""
    q, kv, encoding, options = build(case)
    out, lse = decode(q, kv, encoding, **options)
    want_out, want_lse = definition(q, kv, encoding, **options)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want_out, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), want_lse, atol=TOLERANCE, rtol=TOLERANCE)


CODECS = [
    *(KIVI(bits=bits) for bits in (1, 2, 3, 4, 8)),
    KIVI(bits=4, group_size=64),
    GEAR(bits=2, group_size=32),
    GEAR(bits=4, group_size=32, sparsity=0.0),
    ThinK(),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_over_what_a_codec_decodes(
    decode: Decode, codec: Codec, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, n, size, dim = 2, 3, 64, 64
    k, v = (torch.randn(heads, n, size, dim).to(dtype) for _ in "kv")
    view = layer_view(k.flatten(1, 2), v.flatten(1, 2), torch.randn(32, heads * 2, dim))
    fields = codec.encode(k, v, view)
    encoding = codec.encoding()
    assert encoding is not None
    columns = codec.columns(size, dim, dim, dtype)
    assert set(encoding.fields) == {column.name for column in columns}
    format = PageFormat(size, tuple(Field(c.name, c.dtype, c.width, c.rows) for c in columns))
    data = torch.zeros(heads * n * format.page_bytes, dtype=torch.uint8)
    tables = torch.arange(heads * n).view(1, heads, n) * (format.page_bytes // 64)
    for name, values in fields.items():
        format.view(data, name)[tables[0]] = values
    lengths = torch.full((1, heads), n * size, dtype=torch.int32)
    q = torch.randn(1, heads * 2, dim).to(dtype)
    out, lse = decode(q, PagedKV(data, format, tables.int(), lengths), encoding, scale=0.125)
    k_read, v_read = (x.flatten(1, 2) for x in codec.decode(fields))
    for head in range(heads * 2):
        want = naive.attend(q[0, head], k_read[head // 2], v_read[head // 2], scale=0.125)
        torch.testing.assert_close(out[0, head].double(), want[0], atol=TOLERANCE, rtol=0)
        assert lse[0, head].item() == pytest.approx(want[1], abs=TOLERANCE)


KIVI_LIKE = PageEncoding(
    Encoding(Quantized(2, 32, "tokens")), Encoding(Quantized(2, 32, "channels"))
)


@pytest.fixture(scope="module")
def ragged() -> PagedKV:
    """One long head, many chunks of work, among short and empty ones."""
    torch.manual_seed(0)
    format = page_format(KIVI_LIKE, 64, 64, 64, torch.bfloat16)
    return pages(KIVI_LIKE, format, 64, 64, [[47, 1], [0, 11], [8, 9]])


def test_long_heads_among_short_ones(decode: Decode, ragged: PagedKV) -> None:
    q = torch.randn(3, 8, 64).bfloat16()
    got = decode(q, ragged, KIVI_LIKE, scale=0.1)
    want = definition(q, ragged, KIVI_LIKE, scale=0.1)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=TOLERANCE, rtol=TOLERANCE)
    assert got[1][1, :4].eq(-torch.inf).all()
    assert got[0][1, :4].eq(0).all()


def test_only_the_pages_of_a_list_are_read(decode: Decode, ragged: PagedKV) -> None:
    q = torch.randn(3, 4, 64).bfloat16()
    chosen = torch.tensor(
        [[[0, 3, 46], [0, 1, 2]], [[0, 1, 2], [4, 5, 10]], [[1, 2, 3], [8, 9, 10]]]
    )
    few = narrowed(ragged, chosen)
    assert few.lengths.tolist() == [[192, 64], [0, 192], [192, 64]]
    got = decode(q, few, KIVI_LIKE, scale=0.1)
    tables = torch.zeros(3, 2, 3, dtype=torch.int32)
    for row in range(3):
        for head in range(2):
            held = int(ragged.lengths[row, head]) // 64
            mine = [int(ragged.tables[row, head, i]) for i in chosen[row, head] if i < held]
            tables[row, head, : len(mine)] = torch.tensor(mine)
    want = definition(
        q, PagedKV(ragged.data, ragged.format, tables, few.lengths), KIVI_LIKE, scale=0.1
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=TOLERANCE, rtol=TOLERANCE)


def test_nan_is_not_hidden(decode: Decode, ragged: PagedKV) -> None:
    q = torch.randn(3, 8, 64).bfloat16()
    q[0, 0] = torch.nan
    out, lse = decode(q, ragged, KIVI_LIKE, scale=1.0)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert not out[0, 1:].isnan().any()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("group", [1, 4, 6])
def test_native_bits_depend_on_neither_threads_nor_batch(ragged: PagedKV, group: int) -> None:
    q = torch.randn(3, 2 * group, 64).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decode_encoded(q, ragged, KIVI_LIKE, scale=0.2, backend="native")
        torch.set_num_threads(2)
        together = decode_encoded(q, ragged, KIVI_LIKE, scale=0.2, backend="native")
    finally:
        torch.set_num_threads(before)
    last = PagedKV(ragged.data, ragged.format, ragged.tables[2:], ragged.lengths[2:])
    row = decode_encoded(q[2:], last, KIVI_LIKE, scale=0.2, backend="native")
    for one, two, apart in zip(alone, together, row, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[2:], apart)


def test_an_empty_batch(decode: Decode, ragged: PagedKV) -> None:
    none = PagedKV(ragged.data, ragged.format, ragged.tables[:0], ragged.lengths[:0])
    out, lse = decode(torch.zeros(0, 8, 64).bfloat16(), none, KIVI_LIKE, scale=1.0)
    assert out.shape == (0, 8, 64)
    assert lse.shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 8, 32)}, r"q must be \[tokens, q_heads, 64\]"),
        ({"q": torch.zeros(3, 8, 64).int()}, "q must be of floating point"),
        ({"q": torch.zeros(3, 7, 64)}, "7 query heads cannot be shared by 2 KV heads"),
        ({"q": torch.zeros(2, 8, 64)}, "2 queries .* 3 rows"),
        ({"softcap": 0.0}, "softcap must be positive"),
        (
            {"encoding": PageEncoding(KIVI_LIKE.k, Encoding(Plain()))},
            r"lack \['v'\]",
        ),
        (
            {"encoding": PageEncoding(Encoding(Quantized(4, 32, "tokens")), KIVI_LIKE.v)},
            "k_codes must have 32 bytes per token",
        ),
        (
            {"encoding": PageEncoding(Encoding(Quantized(2, 16, "tokens")), KIVI_LIKE.v)},
            "k_scale and k_zero must have 4 rows per page",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    ragged: PagedKV, changes: dict, message: str
) -> None:
    arguments = {"q": torch.zeros(3, 8, 64), "kv": ragged, "encoding": KIVI_LIKE, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        decode_encoded(**(arguments | changes))


@pytest.mark.usefixtures("extension")
def test_pages_that_are_not_whole_are_refused(ragged: PagedKV) -> None:
    partly = PagedKV(ragged.data, ragged.format, ragged.tables, ragged.lengths - 1)
    with pytest.raises(ValueError, match="encoded pages must be whole"):
        decode_encoded(torch.zeros(3, 8, 64), partly, KIVI_LIKE, scale=1.0)
