"""Sequences that share a prefix attend to it together, and get what each gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.attention import decode
from tamis.cache import BatchView, CacheLayout, CommonPrefix, LayerShape, PagedCache, PrefixTree
from tamis.engine.shared import WORTH, SharedDecode
from tamis.engine.views import LayerOptions

PAGE, KV_HEADS, Q_HEADS, DIM = 8, 2, 6, 16


def grown(cache: PagedCache, sequence: Any, n: int, generator: torch.Generator) -> BatchView:
    """Append `n` random tokens to a sequence."""
    sequence.reserve(n)
    at = torch.arange(sequence.next_position, sequence.next_position + n, dtype=torch.int32)
    view = BatchView(cache, [sequence], [n], at)
    k, v = torch.randn(2, n, KV_HEADS, DIM, generator=generator).to(cache.layout.dtype)
    view.append(0, k, v)
    sequence.advance(n)
    return view


def step(lengths: list[int], dtype: torch.dtype) -> BatchView:
    """A step of sequences with so many tokens beyond a prefix of 40; -1: one without it."""
    generator = torch.Generator().manual_seed(0)
    layout = CacheLayout((LayerShape(KV_HEADS, DIM, DIM),), PAGE, dtype)
    cache = PagedCache(layout, 4 << 20)
    tree, first = PrefixTree(cache), cache.new_sequence()
    grown(cache, first, 40, generator)
    block = tree.extend(None, range(40), first)
    assert block is not None
    sequences = []
    for n in lengths:
        sequences.append(cache.new_sequence() if n < 0 else tree.begin(block))
        grown(cache, sequences[-1], abs(n), generator)
    positions = torch.tensor([s.next_position for s in sequences], dtype=torch.int32)
    return BatchView(cache, sequences, [0] * len(sequences), positions)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_it_equals_attention_of_each_alone(with_sinks: bool, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    view = step([3, -7, 20, 1], torch.float32)
    q = torch.randn(4, Q_HEADS, DIM, generator=generator)
    sinks = torch.randn(Q_HEADS, generator=generator) if with_sinks else None
    common = CommonPrefix.of(view, 4, least=2 * 40)
    assert common is not None
    out, lse = SharedDecode(common, 4)(0, q, LayerOptions(0.3, None, softcap, sinks))
    pages = view.pages(0, 0, 4, with_new=True)
    wanted, wanted_lse = decode(q, pages, scale=0.3, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-6)


def test_in_bf16_it_is_as_close_as_two_roundings() -> None:
    view = step([3, 20], torch.bfloat16)
    q = torch.randn(2, Q_HEADS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    common = CommonPrefix.of(view, 2, least=40)
    assert common is not None
    out, _ = SharedDecode(common, 2)(0, q, LayerOptions(0.3, None, None, None))
    wanted, _ = decode(q, view.pages(0, 0, 2, with_new=True), scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted.float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_a_batch_that_is_worth_it_says_what_each_request_says_alone(
    load: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Enough requests over one prefix that the engine attends to it together."""
    calls = []
    attend = SharedDecode.__call__

    def counted(self: SharedDecode, *args: Any) -> Any:
        calls.append([len(rows) for rows in self._common.groups])
        return attend(self, *args)

    monkeypatch.setattr(SharedDecode, "__call__", counted)
    llm = LLM(load(name), kv_memory="64MiB", page_size=16, prefix_cache=True)
    plain = LLM(load(name), kv_memory="64MiB", page_size=16)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 256, (480,), generator=generator).tolist()
    prompts = [[*shared, *range(i, i + 1 + i % 5)] for i in range(1 + WORTH // 480 + 1)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    assert calls
    assert {tuple(groups) for groups in calls} == {(len(prompts),)}
    wanted = [plain.generate([p], params)[0].token_ids for p in prompts[::7]]
    assert [o.token_ids for o in outputs[::7]] == wanted
