"""The public API: prompts in every form, streaming, stopping, text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tamis import LLM, Plan, SamplingParams
from tamis.errors import KVMemoryError, PlanError, RequestError
from tests.tiny_models import EOS

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def settings(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "kv_memory": "16MiB"} | changes


@pytest.fixture(scope="module")
def llm(tiny_dir: Callable[[str], Path]) -> LLM:
    return LLM(tiny_dir("llama"), **settings())


def test_a_prompt_may_be_text_or_ids_one_or_many(llm: LLM) -> None:
    ids = llm.encode("hello")
    expected = llm.generate([ids], PARAMS)[0].token_ids
    for prompts in ("hello", ids, ["hello"], [ids], ("hello",)):
        outputs = llm.generate(prompts, PARAMS)
        assert [o.token_ids for o in outputs] == [expected]
    mixed = llm.generate(["hello", ids, "other"], PARAMS)
    assert [o.token_ids for o in mixed[:2]] == [expected, expected]
    assert llm.generate([], PARAMS) == []


def test_params_and_plans_are_for_all_prompts_or_one_each(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)]
    outputs = llm.generate(["a", "b"], each, plan=["dense", Plan()])
    assert [len(o.token_ids) for o in outputs] == [2, 3]
    with pytest.raises(RequestError, match="2 params for 3 prompts"):
        llm.generate(["a", "b", "c"], each)
    with pytest.raises(RequestError, match="1 plans for 2 prompts"):
        llm.generate(["a", "b"], PARAMS, plan=["dense"])


def test_a_wrong_prompt_among_good_ones_runs_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["good", []], PARAMS)
    assert llm.engine.idle
    assert llm.engine.scheduler.idle


@pytest.mark.parametrize("plan", ["snapkv(budget=1.5)", "desne", "dense(budget=1)", "1+", 3])
def test_a_wrong_plan_is_refused(llm: LLM, tiny_dir: Callable[[str], Path], plan: Any) -> None:
    with pytest.raises(PlanError):
        llm.generate("hello", PARAMS, plan=plan if isinstance(plan, str) else [plan])
    with pytest.raises(PlanError):
        LLM(tiny_dir("llama"), plan=plan, **settings())


def test_plans_round_trip() -> None:
    assert Plan.parse(str(Plan())) == Plan.parse(" Dense ") == Plan.parse(None) == Plan()
    with pytest.raises(PlanError, match="did you mean 'dense'"):
        Plan.parse("desne")


def test_stream_adds_up_to_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2)
    [whole] = llm.generate("hello", params)
    increments = list(llm.stream("hello", params))
    assert "".join(i.text for i in increments) == whole.text
    assert [t for i in increments for t in i.token_ids] == whole.token_ids
    assert [p for i in increments for p in i.logprobs] == whole.logprobs
    assert [i.finish_reason for i in increments] == [None] * 19 + ["length"]
    assert increments[-1].output is not None
    assert increments[-1].output.text == whole.text


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("hello", PARAMS)
    next(stream)
    assert llm.engine.cache.bytes_in_use > 0
    stream.close()
    assert llm.engine.cache.bytes_in_use == 0
    assert llm.engine.idle


def test_streams_and_batches_may_interleave(llm: LLM) -> None:
    alone = [llm.generate(p, PARAMS)[0].token_ids for p in ("one", "two", "three")]
    first, second = llm.stream("one", PARAMS), llm.stream("two", PARAMS)
    got: list[list[int]] = [[], []]
    for a, b in zip(first, second, strict=True):
        got[0] += a.token_ids
        got[1] += b.token_ids
        if len(got[0]) == 3:
            assert llm.generate("three", PARAMS)[0].token_ids == alone[2]
    assert got == alone[:2]


def test_ctrl_c_frees_everything(llm: LLM) -> None:
    """An interrupt in the middle of the model's forward leaves an engine that works."""
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    expected = llm.generate("hello", PARAMS)[0].token_ids
    hook = llm.model.hf.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "world"], PARAMS)
    hook.remove()
    assert llm.engine.idle
    assert llm.engine.cache.bytes_in_use == 0
    assert llm.generate("hello", PARAMS)[0].token_ids == expected


def test_eos_stops_unless_ignored(tiny_dir: Callable[[str], Path]) -> None:
    llm = LLM(tiny_dir("llama"), **settings())
    free = SamplingParams(max_tokens=30, ignore_eos=True, logit_bias={EOS: 100})
    [ignored] = llm.generate("hello", free)
    assert (len(ignored.token_ids), ignored.finish_reason) == (30, "length")
    [stopped] = llm.generate("hello", SamplingParams(max_tokens=30, logit_bias={EOS: 100}))
    assert (stopped.token_ids, stopped.finish_reason) == ([EOS], "stop")
    assert stopped.completions[0].stop_reason == EOS
    assert stopped.text == ""
    late = SamplingParams(max_tokens=30, min_tokens=4, logit_bias={EOS: 100})
    assert len(llm.generate("hello", late)[0].token_ids) == 5


def test_stop_strings_and_ids_end_the_text(llm: LLM) -> None:
    _, a, b = llm.encode("ab")
    only_ab = {a: 100, b: 100}
    params = SamplingParams(max_tokens=40, logit_bias=only_ab, top_k=2, temperature=20, seed=1)
    [whole] = llm.generate("hello", params)
    assert set(whole.text) <= {"a", "b"}
    at = whole.text.index("ba")
    [cut] = llm.generate("hello", replace(params, stop=["ba"]))
    assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
    assert cut.completions[0].stop_reason == "ba"
    [kept] = llm.generate("hello", replace(params, stop=["ba"], include_stop=True))
    assert kept.text == whole.text[: at + 2]
    first_b = whole.token_ids.index(b)
    [by_id] = llm.generate("hello", replace(params, stop_token_ids=[b]))
    assert by_id.token_ids == whole.token_ids[: first_b + 1]
    assert by_id.text == whole.text[:first_b]
    [with_id] = llm.generate("hello", replace(params, stop_token_ids=[b], include_stop=True))
    assert with_id.text == whole.text[: first_b + 1]


def test_a_conversation_is_encoded_by_the_models_template(llm: LLM) -> None:
    assert llm.has_chat_template
    ids = llm.encode_chat([{"role": "user", "content": "hi"}])
    assert llm.model.tokenizer.decode(ids) == "<bos>[user]hi\n[assistant]"


def test_a_conversation_of_no_messages_is_refused(tiny_dir: Callable) -> None:
    with pytest.raises(RequestError, match="the conversation is empty"):
        LLM(tiny_dir("llama"), **settings()).encode_chat([])


def test_without_a_tokenizer_prompts_are_ids(tmp_path: Path, tiny_dir: Callable) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny_dir("llama") / name, bare)
    llm = LLM(bare, **settings())
    [output] = llm.generate([[1, 2, 3]], PARAMS)
    assert len(output.token_ids) == 8
    assert output.text == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("text", PARAMS)
    with pytest.raises(RequestError, match="need a tokenizer"):
        llm.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="no chat template"):
        llm.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 2048])
def test_prompts_are_scored_as_by_transformers(
    tiny_dir: Callable[[str], Path], tiny_model: Callable, max_batch_tokens: int
) -> None:
    llm = LLM(tiny_dir("llama"), **settings(max_batch_tokens=max_batch_tokens))
    prompts = [llm.encode("a text of some length"), llm.encode("x"), [5]]
    params = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=3)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        logits = tiny_model("llama")(torch.tensor([prompt])).logits[0]
        expected = logits.detach().log_softmax(-1)[:-1]
        first, *scored = output.prompt_logprobs or []
        assert first is None
        assert [entry.token_id for entry in scored] == prompt[1:]
        for entry, row in zip(scored, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
    assert llm.generate("x", PARAMS)[0].prompt_logprobs is None


def test_a_preempted_prompt_is_scored_once(llm: LLM) -> None:
    """Prompts that are longer than the room for two of them, computed again after preemption."""
    prompts = [[i % 200 for i in range(n, n + 90)] for n in range(3)]
    params = SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    free = [output.prompt_logprobs for output in llm.generate(prompts, params)]
    room = llm.engine.cache.required_bytes(200, chunk=16)
    tight = LLM(llm.model, kv_memory=room, max_batch_tokens=16, page_size=4)
    outputs = tight.generate(prompts, params)
    assert tight.engine.stats.preemptions > 0
    for output, expected in zip(outputs, free, strict=True):
        assert output.prompt_logprobs is not None
        assert expected is not None
        assert [p and p.token_id for p in output.prompt_logprobs] == [
            p and p.token_id for p in expected
        ]


def test_metrics_say_what_happened(llm: LLM) -> None:
    [output] = llm.generate("hello", PARAMS)
    m = output.metrics
    assert (m.prompt_tokens, m.output_tokens, m.preemptions) == (6, 8, 0)
    assert m.queue_s is not None
    assert m.ttft_s is not None
    assert m.tpot_s is not None
    assert 0 <= m.queue_s <= m.ttft_s <= m.ttft_s + 7 * m.tpot_s <= m.total_s
    assert 0 < m.kv_bytes == m.kv_bytes_peak == m.kv_bytes_dense
    [short] = llm.generate("hello", SamplingParams(max_tokens=1))
    assert short.metrics.tpot_s is None


def test_progress_is_shown_when_asked(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate("hello", PARAMS)
    assert capfd.readouterr().err == ""
    llm.generate("hello", PARAMS, progress=True)
    shown = capfd.readouterr().err
    assert "prefill" in shown
    assert "decode" in shown


def test_without_max_tokens_an_output_ends_where_the_memory_does(llm: LLM) -> None:
    room = llm.engine.cache.required_bytes(128, chunk=64)
    tight = LLM(llm.model, kv_memory=room, max_batch_tokens=64)
    [output] = tight.generate("hello", SamplingParams(max_tokens=None, ignore_eos=True))
    assert output.finish_reason == "length"
    assert 100 <= len(output.token_ids) < 400
    with pytest.raises(KVMemoryError):
        tight.generate("x" * 400, SamplingParams(max_tokens=None))
