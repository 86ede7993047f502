"""The comparison with other engines measures what it says, goes on where it stopped, and its page
says what was measured."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import peers
import peers_run
import peers_worker
from contestants import ROOM, OneByOne
from peers_page import page
from peers_plot import draw
from peers_process import EngineError, Process
from peers_roster import (
    CONTINUOUS,
    ENGINES,
    LLAMA_CPP,
    MODELS,
    PARTS,
    QUICK_MODEL,
    TAMIS,
    TRANSFORMERS,
    Engine,
    Part,
    quick_parts,
    shape_of,
)
from peers_summary import summarize
from peers_weights import gguf_name, interleaved
from tamis.cli.machine import this_machine

RATES = {"read_bytes_per_s": 1e10, "matmul_fp32_flops": 1e11, "matmul_bf16_flops": 1e12}


def quiet(text: str) -> None:
    """Says nothing."""


def record(name: str, samples: dict, *, tokens: int = 8192, requests: int = 0, **other) -> dict:
    """A line of results, of the 27M model."""
    part = Part(name, other.pop("model", "27M"), tuple(samples), tokens, requests, 32)
    memory = {"resident_before": {"resident": 100}, "memory": {"resident": 120, "peak": 150}}
    return {
        "part": vars(part) | {"engines": list(part.engines)},
        "date": "2026-01-02T03:04:05+00:00",
        "threads": 2,
        "rates": RATES,
        "samples": {engine: memory | values for engine, values in samples.items()},
        "failed": {},
        "others": 0.0,
    } | other


def steps(prefill_s: list[float], decode_s: list[float], kv_bytes: int = 0) -> dict:
    """Samples of one request."""
    return {"prefill_s": prefill_s, "decode_s": decode_s, "kv_bytes": kv_bytes}


def answers(*tokens_per_s: float) -> dict:
    """Samples of several requests."""
    return {
        "throughput": [
            {"tokens_per_s": rate, "decode_tokens_per_s": 2 * rate, "overhead": None}
            for rate in tokens_per_s
        ]
    }


# The plan of the run


def test_every_part_fits_its_model():
    for part in (*PARTS, *quick_parts()):
        assert set(part.engines) <= ENGINES.keys()
        # One request goes on from round to round, and for the profile; several begin anew.
        rounds = 1 if part.requests else part.rounds + 1
        assert rounds * part.new_tokens <= ROOM
        assert part.tokens + ROOM <= shape_of(part.model).max_tokens
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)


def test_every_engine_runs_in_the_quick_parts_and_in_the_whole():
    for parts in (PARTS, quick_parts()):
        assert {name for part in parts for name in part.engines} == ENGINES.keys()


def test_the_larger_model_has_the_shape_it_is_named_for():
    assert MODELS["0.5B"].parameters / 1e6 == pytest.approx(415, abs=1)


def test_parts_are_chosen_by_how_their_names_begin():
    assert [part.name for part in peers.chosen(PARTS, ["27M 2k"])] == [
        "27M 2k dense",
        "27M 2k quantized",
    ]
    assert peers.chosen(PARTS, None) == list(PARTS)


# Resuming


def test_the_latest_line_of_a_part_counts(tmp_path):
    path = tmp_path / "peers.jsonl"
    assert peers.records(path) == {}
    lines = [record("a", {}), record("b", {}), record("a", {}, threads=7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = peers.records(path)
    assert list(found) == ["a", "b"]
    assert found["a"]["threads"] == 7


@pytest.fixture
def stopped(tmp_path, monkeypatch, directory):
    """`stopped(*arguments)` is the command with Ctrl-C while the second part runs."""
    ran = []

    def run(part, *_):
        ran.append(part.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return record(part.name, {})

    monkeypatch.setattr(peers, "run", run)
    monkeypatch.setattr(peers, "model_directory", lambda model, gguf: directory)
    monkeypatch.setattr(peers, "is_installed", lambda peer: True)
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "r.jsonl")
    app = typer.Typer()
    app.command()(peers.main)
    ending, threads = signal.getsignal(signal.SIGTERM), str(torch.get_num_threads())
    yield lambda *arguments: CliRunner().invoke(app, ["--threads", threads, *arguments])
    signal.signal(signal.SIGTERM, ending)
    assert len(ran) == 2


def test_ctrl_c_keeps_the_parts_that_are_done_and_says_so(tmp_path, stopped):
    found = stopped()
    assert found.exit_code == 130
    assert f"{tmp_path / 'r.jsonl'} keeps parts: 1; the same command goes on" in found.output
    assert list(peers.records(tmp_path / "r.jsonl")) == [PARTS[0].name]


def test_ctrl_c_in_a_quick_run_keeps_nothing_and_says_so(tmp_path, stopped):
    found = stopped("--quick")
    assert found.exit_code == 130
    assert "nothing is kept" in found.output
    assert not (tmp_path / "r.jsonl").exists()


# Engines in processes of their own


@pytest.fixture(scope="module")
def worker(directory):
    """tamis, loaded as a worker loads it."""
    from contestants_tamis import Tamis

    return peers_worker.Worker(Tamis(directory), vocab=128)


def test_a_worker_measures_one_request(worker, shape):
    assert worker.prefill(tokens=100, seed="a") > 0
    assert worker.decode(tokens=4) > 0
    assert worker.kv_bytes() >= shape.kv_bytes(104)
    profile = worker.profile(tokens=8)
    assert set(profile) == {"linear layers", "attention", "all else"}
    assert all(seconds > 0 for name, seconds in profile.items() if name != "linear layers")


def test_a_worker_measures_several_requests_with_any_engine(worker):
    sizes = {"requests": 3, "tokens": 20, "new_tokens": 6, "seed": "a"}
    assert worker.answer(**sizes)["overhead"] is not None
    steps_only = OneByOne(worker._engine)
    assert peers_worker.Worker(steps_only, vocab=128).answer(**sizes)["overhead"] is None


def test_the_peak_counts_from_where_it_is_watched(worker):
    before = worker.watch_memory()["resident"]
    size = np.ones(64 << 20, dtype=np.uint8).nbytes  # given back at once
    after = worker.memory()
    assert after["peak"] - before >= 0.9 * size
    assert after["resident"] - before < 0.5 * size


def test_prompts_depend_on_their_seed_alone(worker):
    assert worker._prompt(50, "a") == worker._prompt(50, "a") != worker._prompt(50, "b")


@pytest.mark.slow
def test_a_part_runs_its_engines_in_turns_and_goes_on_without_those_that_fail(
    directory, tmp_path, monkeypatch
):
    monkeypatch.setitem(ENGINES, "no such plan", replace(ENGINES[TAMIS], options={"plan": "nope"}))
    part = Part("p", QUICK_MODEL, (TAMIS, "no such plan"), 60, new_tokens=4, prefills=2, rounds=3)
    said = []
    result = peers_run.run(part, directory, 1, tmp_path, said.append)
    samples = result["samples"]
    assert samples.keys() == {TAMIS}
    assert len(samples[TAMIS]["prefill_s"]) == 2
    assert len(samples[TAMIS]["decode_s"]) == 3
    assert samples[TAMIS]["memory"]["peak"] > 0
    assert 0 <= result["others"] < 1
    assert "nope" in result["failed"]["no such plan"]
    assert any("decode" in text for text in said)
    crowd = replace(part, engines=(TAMIS,), requests=2)
    result = peers_run.run(crowd, directory, 1, tmp_path, said.append)
    assert len(result["samples"][TAMIS]["throughput"]) == 3
    assert json.loads(json.dumps(result)) == {**result, "part": {**vars(crowd), "engines": [TAMIS]}}


@pytest.mark.slow
def test_a_process_says_why_it_cannot(directory, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(EngineError, match="no_such_module"):
        Process(Engine("no_such_module:Nobody"), directory, 1, log)
    with pytest.raises(EngineError, match="cannot be run"):
        Process(Engine("a:B", environment="nowhere"), directory, 1, log)
    process = Process(ENGINES[TAMIS], directory, 1, log)
    try:
        with pytest.raises(EngineError, match="no answer in 0 s"):
            process.ask("prefill", 0, tokens=100, seed="a")
    finally:
        process.close()
    with pytest.raises(EngineError, match="ended"):
        process.ask("kv_bytes", 1)


# Weights for llama.cpp


def test_weights_have_their_names_in_llama_cpp():
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.3.self_attn.q_norm.weight")


def test_rotation_of_neighbours_equals_rotation_of_halves():
    """Each pair that turns together keeps its frequency: channel i of the first half and of the
    second stand at 2i and 2i + 1."""
    rows = np.arange(2 * 6).reshape(12, 1)  # two heads of 6 channels
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# What the samples say


@pytest.fixture
def summary():
    lines = [
        record(
            "27M 8k dense",
            {
                TAMIS: steps([2.0, 4.0], [0.004, 0.006], 1000),
                LLAMA_CPP: steps([12.0], [0.010]),
            },
        ),
        record(
            "27M 8k quantized",
            {TAMIS: steps([6.0], [0.008]), "llama.cpp, q4_0 KV": steps([12.0], [0.016])},
        ),
        record("27M 8k alone", {LLAMA_CPP: steps([99.0], [0.1])}, others=None),
        # Disturbed: the target it would meet is not judged.
        record("0.5B 8k dense", {TAMIS: steps([1.0], [0.001])}, model="0.5B", others=0.25),
        record(
            "27M 32k",
            {TAMIS: steps([1.0], [0.01]), TRANSFORMERS: steps([2.0], [0.02])},
            tokens=32_768,
        ),
        record(
            "crowd",
            {TAMIS: answers(30.0), TRANSFORMERS: answers(5.0, 11.0, 10.0), CONTINUOUS: {}},
            requests=8,
            failed={CONTINUOUS: "too slow"},
        ),
    ]
    return summarize(lines, this_machine())


def found(rows, **wanted):
    """The one row that has these."""
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_samples_of_all_parts_are_pooled_and_ratios_stay_within_a_part(summary):
    ours = found(summary["series"], engine=TAMIS, model="27M", tokens=8192)
    assert ours["prefill_s"] == {"median": 4.0, "low": 2.0, "high": 6.0, "n": 3}
    theirs = found(summary["series"], engine=LLAMA_CPP)
    assert theirs["to_tamis"]["prefill_s"] == pytest.approx(12 / 3)
    other = found(summary["series"], engine="llama.cpp, q4_0 KV")
    assert other["to_tamis"] == pytest.approx({"prefill_s": 2.0, "decode_s": 2.0})


def test_limits_are_of_the_measured_rates_and_of_what_an_engine_keeps(summary):
    shape = shape_of("27M")
    ours = found(summary["series"], engine="llama.cpp, q4_0 KV")
    assert ours["limit"]["prefill_s"] == shape.prefill_flops(8192) / 1e12
    assert ours["limit"]["decode_s"] == shape.decode_bytes(0) / 1e10
    crowd = found(summary["crowds"], engine=TAMIS)
    assert crowd["limit"]["decode_tokens_per_s"] == 8 / (shape.decode_bytes(8192 + 16, 8) / 1e10)
    assert crowd["limit"]["tokens_per_s"] < crowd["limit"]["decode_tokens_per_s"]


def test_several_requests_are_compared_by_their_medians(summary):
    assert found(summary["crowds"], engine=TRANSFORMERS)["tamis_to_it"] == 3.0
    assert found(summary["crowds"], engine=TRANSFORMERS)["growth_bytes"] == 50


def test_targets_are_judged_where_their_numbers_are(summary):
    verdicts = {target["name"]: target["met"] for target in summary["targets"]}
    assert verdicts == {
        "27M, 32,768 tokens: decode, times as fast as Transformers": False,
        "27M, 32,768 tokens: prefill, times as fast as Transformers": True,
        "27M, 8 requests: tokens/s, times those of Transformers": True,
    }


def test_the_page_shows_tables_targets_failures_and_notes(summary, tmp_path):
    text = page(summary, notes="Read this.")
    assert "| tamis | 4.00 (2.00 .. 6.00) |" in text
    assert "| ≥ 3 | 2.00 | **miss** |" in text
    assert "| ≥ 1.5 | 2.00 | hit |" in text
    assert "Read this." in text
    assert f"crowd: {CONTINUOUS} failed: too slow" in text
    assert "0.5B 8k dense (25 %)" in text
    assert "27M 8k dense (" not in text
    assert "all that speaks for them: 27M 8k alone." in text
    draw(summary["series"], tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
