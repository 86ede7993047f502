"""Statistics of attention equal their definitions, by every backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import decode, observe, observe_native, observe_reference, prefill
from tamis.cache.format import PagedKV
from tamis.errors import ConfigError
from tamis.platform import native_module
from tests.attention import naive

Implementation = Callable[[str], Callable[..., torch.Tensor]]
PUBLIC = ["reference", *(["native"] if native_module(warn=False) else [])]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """A function's implementation by its name, for one backend and instruction set."""
    if request.param == "reference":
        return lambda name: getattr(observe_reference, name)
    return lambda name: partial(getattr(observe_native, name), native_module(), isa=request.param)


def scores_of(
    q: torch.Tensor,
    cached: naive.Cached,
    rows: list[int],
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Scores of query `i` over row rows[i], fp64 [n, q_heads, max_len]; -inf where not seen."""
    group = q.shape[1] // len(cached.k[0])
    width = max(len(k) for row in cached.k for k in row)
    out = torch.full((*q.shape[:2], width), -torch.inf, dtype=torch.float64)
    for i, row in enumerate(rows):
        for head in range(q.shape[1]):
            k, at = (x[row][head // group] for x in (cached.k, cached.positions))
            scores = k.double() @ q[i, head].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if positions is not None:
                seen = at <= positions[i]
                if window is not None:
                    seen &= at > positions[i] - window
                scores = scores.masked_fill(~seen, -torch.inf)
            out[i, head, : len(k)] = scores
    return out


def weights_of(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension of scores [n, q_heads, max_len], zero for no token."""
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.double().expand(len(scores), -1)[..., None]], -1)
    return torch.softmax(logits, -1)[..., : scores.shape[2]].nan_to_num(0.0)


def lse_of(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Log-sum-exp over the last dimension, fp32 [n, q_heads]."""
    lse = scores.logsumexp(-1)
    return (lse if sinks is None else torch.logaddexp(lse, sinks.double())).float()


@st.composite
def cases(draw: st.DrawFn, rows: int, longest: int) -> dict:
    """What describes a call on pages of `rows` sequences; `build` makes its tensors."""
    kv_heads = draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, longest), min_size=kv_heads, max_size=kv_heads)
    return {
        "lengths": draw(st.lists(heads, min_size=rows, max_size=rows)),
        "queries": draw(st.integers(1, 70)) if rows == 1 else rows,
        "group": draw(st.integers(1, 5)),
        "k_dim": draw(st.sampled_from([8, 33, 40, 64])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 120)),
        "sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict) -> tuple[torch.Tensor, naive.Cached, dict, torch.Tensor | None]:
    """Queries, pages, the options scale, positions, window, softcap, and the sinks of a case."""
    torch.manual_seed(case["seed"])
    names = ("page_size", "k_dim", "dtype", "gap")
    cached = naive.cached(case["lengths"], v_dim=8, **{name: case[name] for name in names})
    q_heads = len(case["lengths"][0]) * case["group"]
    q = torch.randn(case["queries"], q_heads, case["k_dim"]).to(case["dtype"])
    last = max(int(at[-1]) if len(at) else 0 for row in cached.positions for at in row)
    positions = torch.randint(0, last + 20, (case["queries"],)).sort().values
    options = {
        "scale": case["k_dim"] ** -0.5,
        "positions": positions,
        "window": case["window"],
        "softcap": case["softcap"],
    }
    return q, cached, options, torch.randn(q_heads) if case["sinks"] else None


def assert_equal(found: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for fp32 rounding: queries and keys are exact in any dtype."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want.double(), atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(rows=1, longest=700))
def test_chunk_scores_equal_the_definition(implementation: Implementation, case: dict) -> None:
    q, cached, options, _ = build(case)
    width = max(case["lengths"][0])
    found = implementation("chunk_scores")(q, cached.kv, width, **options)
    assert_equal(found, scores_of(q, cached, [0] * len(q), **options).transpose(0, 1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(rows=1, longest=700))
def test_column_sums_equal_the_definition(implementation: Implementation, case: dict) -> None:
    q, cached, options, sinks = build(case)
    scores = scores_of(q, cached, [0] * len(q), **options)
    width = max(case["lengths"][0])
    found = implementation("column_sums")(q, cached.kv, lse_of(scores, sinks), width, **options)
    assert_equal(found, weights_of(scores, sinks).sum(0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(rows=3, longest=700), everything=st.booleans())
def test_decode_weights_equal_the_definition(
    implementation: Implementation, case: dict, everything: bool
) -> None:
    q, cached, options, sinks = build(case)
    if everything:
        options |= {"positions": None, "window": None}
    scores = scores_of(q, cached, [0, 1, 2], **options)
    width = scores.shape[2]
    found = implementation("decode_weights")(q, cached.kv, lse_of(scores, sinks), width, **options)
    assert_equal(found, weights_of(scores, sinks))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(rows=2, longest=150))
def test_decode_scores_equal_the_definition(implementation: Implementation, case: dict) -> None:
    q, cached, options, _ = build(case)
    how = {name: options[name] for name in ("scale", "softcap")}
    want = scores_of(q, cached, [0, 1], **how)
    found = implementation("decode_scores")(q, cached.kv, want.shape[2], **how)
    assert_equal(found, want)


@pytest.mark.parametrize("backend", PUBLIC)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases(rows=1, longest=90))
def test_window_weights_are_the_softmax(backend: str, case: dict) -> None:
    q, cached, options, sinks = build(case)
    want = weights_of(scores_of(q, cached, [0] * len(q), **options), sinks).transpose(0, 1)
    assert_equal(
        observe.window_weights(q, cached.kv, **options, sinks=sinks, backend=backend), want
    )


@pytest.mark.parametrize("backend", PUBLIC)
@pytest.mark.parametrize("decay", [1.0, 0.9, 1e-3])
def test_column_sums_of_a_prefilled_chunk_decay(backend: str, decay: float) -> None:
    """With a gap in the positions, and so wide a span of them that old queries vanish."""
    torch.manual_seed(0)
    cached = naive.cached([[200, 200]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32)
    k, v = (torch.stack(x[0], 1) for x in (cached.k, cached.v))
    q, sinks = torch.randn(80, 6, 32), torch.randn(6)
    options = {"scale": 0.3, "positions": torch.arange(120, 200), "window": 90, "softcap": 4.0}
    past = PagedKV(
        cached.kv.data, cached.kv.format, cached.kv.tables, torch.full((1, 2), 120).int()
    )
    _, lse = prefill(q, k[120:], v[120:], past, **options, sinks=sinks)
    found = observe.column_sums(q, cached.kv, lse, **options, decay=decay, backend=backend)
    weights = weights_of(scores_of(q, cached, [0] * 80, **options), sinks)
    assert_equal(
        found, (decay ** torch.arange(79.0, -1, -1).double() @ weights.flatten(1)).view(6, -1)
    )


@pytest.mark.parametrize("backend", PUBLIC)
def test_sums_over_chunks_are_the_sums_over_the_whole(backend: str) -> None:
    """Longer than every tile of queries and of keys."""
    torch.manual_seed(0)
    cached = naive.cached([[4500]], page_size=64, k_dim=16, v_dim=16, dtype=torch.float32)
    k, v = cached.k[0][0][:, None], cached.v[0][0][:, None]
    q, at = torch.randn(4500, 2, 16), torch.arange(4500)
    _, lse = prefill(q, k, v, None, scale=0.5, positions=at)
    whole = observe.column_sums(q, cached.kv, lse, scale=0.5, positions=at, backend=backend)
    parts = [
        observe.column_sums(
            q[cut], cached.kv, lse[cut], scale=0.5, positions=at[cut], backend=backend
        )
        for cut in (slice(0, 1301), slice(1301, 4500))
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.sum(1), torch.full((2,), 4500.0), atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("backend", PUBLIC)
def test_decode_weights_sum_to_one_less_the_sink(backend: str) -> None:
    torch.manual_seed(0)
    cached = naive.cached(
        [[900, 0], [70, 5000]], page_size=16, k_dim=64, v_dim=8, dtype=torch.float32
    )
    q, sinks = torch.randn(2, 8, 64), torch.randn(8)
    _, lse = decode(q, cached.kv, scale=0.1, sinks=sinks)
    sums = observe.decode_weights(q, cached.kv, lse, scale=0.1, backend=backend).sum(-1)
    torch.testing.assert_close(sums, 1 - torch.exp(sinks - lse), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", PUBLIC)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases(rows=2, longest=90), r=st.integers(0, 8))
def test_partial_scores_are_products_over_the_channels(backend: str, case: dict, r: int) -> None:
    q, cached, options, _ = build(case)
    channels = torch.rand(2, len(case["lengths"][0]), case["k_dim"]).argsort(-1)[..., :r]
    scale, group = options["scale"], case["group"]
    found = observe.partial_scores(q, cached.kv, channels, scale=scale, backend=backend)
    want = torch.full_like(found, -torch.inf, dtype=torch.float64)
    for row in range(2):
        for head in range(q.shape[1]):
            k, named = cached.k[row][head // group].double(), channels[row, head // group]
            want[row, head, : len(k)] = k[:, named] @ q[row, head, named].double() * scale
    assert_equal(found, want)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_native_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cached = naive.cached([[1500, 600]], page_size=16, k_dim=40, v_dim=8, dtype=dtype)
    q, lse = torch.randn(150, 6, 40).to(dtype), torch.rand(150, 6) + 7
    options = {"scale": 0.2, "positions": torch.arange(1350, 1500), "backend": "native"}
    last = {"scale": 0.2, "backend": "native"}

    def run() -> tuple[torch.Tensor, ...]:
        return (
            observe.window_weights(q, cached.kv, **options),
            observe.column_sums(q, cached.kv, lse, **options),
            observe.decode_weights(q[-1:], cached.kv, lse[-1:], **last),
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(4)
        together = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", PUBLIC)
def test_strided_queries(backend: str) -> None:
    torch.manual_seed(0)
    cached = naive.cached([[60, 60]], page_size=16, k_dim=8, v_dim=8, dtype=torch.float32)
    q = torch.randn(8, 4, 30).permute(2, 1, 0)
    options = {"scale": 0.2, "positions": torch.arange(30, 60), "backend": backend}
    found = observe.window_weights(q, cached.kv, **options)
    torch.testing.assert_close(found, observe.window_weights(q.contiguous(), cached.kv, **options))


@pytest.mark.parametrize("backend", PUBLIC)
def test_empty_pages_give_empty_statistics(backend: str) -> None:
    kv = naive.cached([[0, 0]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32).kv
    q, lse = torch.randn(1, 4, 8), torch.full((1, 4), -torch.inf)
    options = {"scale": 1.0, "positions": torch.tensor([5]), "backend": backend}
    assert observe.window_weights(q, kv, **options).shape == (4, 1, 0)
    assert observe.column_sums(q, kv, lse, **options).shape == (4, 0)
    assert observe.decode_weights(q, kv, lse, **options).shape == (1, 4, 0)


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("window_weights", {"q": torch.zeros(3, 5, 8)}, "must be a multiple"),
        ("window_weights", {"positions": torch.arange(2)}, r"positions must be .* \[3\]"),
        ("window_weights", {"sinks": torch.zeros(2)}, r"sinks must be \[4\]"),
        ("column_sums", {"rows": 2}, "kv must be one row of pages, got 2"),
        ("column_sums", {"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ("column_sums", {"lse": torch.zeros(3, 2)}, r"lse must be float32 \[3, 4\]"),
        ("column_sums", {"window": 0}, "at least 1, got 0"),
        ("decode_weights", {}, "3 queries cannot read 1 rows"),
        ("decode_weights", {"rows": 3, "lse": torch.zeros(3, 4).double()}, "lse must be float32"),
        ("partial_scores", {"rows": 3, "channels": torch.zeros(3, 2)}, "channels must be int64"),
        ("partial_scores", {"rows": 3, "channels": torch.full((3, 2, 1), 8)}, "must be 0..7"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(function: str, changes: dict, message: str) -> None:
    arguments = {"rows": 1, "q": torch.zeros(3, 4, 8), "scale": 1.0}
    if function != "partial_scores":
        arguments["positions"] = torch.arange(3)
    if function in ("column_sums", "decode_weights"):
        arguments["lse"] = torch.zeros(3, 4)
    arguments |= changes
    heads = [[3, 3]] * arguments.pop("rows")
    arguments["kv"] = naive.cached(heads, page_size=4, k_dim=8, v_dim=8, dtype=torch.float32).kv
    with pytest.raises(ValueError, match=message):
        getattr(observe, function)(**arguments)


def test_an_unknown_backend_is_refused() -> None:
    kv = naive.cached([[3]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32).kv
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        observe.decode_weights(
            torch.zeros(1, 1, 8), kv, torch.zeros(1, 1), scale=1.0, backend="cuda"
        )
