"""The benchmark of a GPU runs through without one, and says what is wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import gpu

pytest.importorskip("triton")

import gpu_checks
import gpu_graphs
import gpu_run
import gpu_times
from gpu_checks import Case
from timing import Spread

CASE = Case(torch.float32, 64, 2, most=100, chunk=20, device="cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """As `--device cpu` sets it for a process of its own."""
    monkeypatch.setenv("TAMIS_BACKEND", "triton")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "gpu.json"


@pytest.mark.slow
def test_everything_is_checked_and_timed_in_a_tiny_run(out):
    assert gpu.main(["--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["complete"]
    assert record["left_out"] == []
    checked = {check["kernel"] for check in record["checks"]}
    assert checked == {
        *gpu_checks.KERNELS,
        "greedy tokens after 40",
        "greedy tokens of recorded steps",
    }
    assert all(check["passed"] for check in record["checks"])
    sizes = gpu_times.Sizes.tiny()
    assert [one["name"] for one in record["times"]] == [
        name for name, _ in gpu_run.items(sizes, "cpu")
    ]
    assert all(one["of_limit"] > 0 and not one["errors"] for one in record["times"])
    (end_to_end,) = record["end_to_end"]
    assert set(end_to_end["token_ms"]) == {"tamis", "Transformers"}
    assert [one["rows"] for one in record["steps"]] == [1, 3]
    assert all(one["step_ms"].keys() == gpu_graphs.WAYS.keys() for one in record["steps"])
    assert record["versions"]["triton"]


def test_what_time_does_not_allow_is_left_out(out):
    settings = replace(gpu_run.Settings.tiny(minutes=0), sizes=gpu_times.Sizes.tiny())
    record = gpu_run.run(settings, out, Console(file=io.StringIO()))
    assert not record.complete
    assert not record.checks
    assert f"check of append, {torch.bfloat16}, 64, 4" in record.left_out
    assert "time of decode" in record.left_out
    assert json.loads(out.read_text())["left_out"] == record.left_out


def test_ctrl_c_leaves_what_there_is(out, monkeypatch):
    first = gpu_checks.run("append", CASE)
    checks = iter([first])

    def interrupted(kernel, case):
        try:
            return next(checks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(gpu_checks, "run", interrupted)
    assert gpu.main(["--device", "cpu", "--out", str(out)]) == 130
    record = json.loads(out.read_text())
    assert [check["kernel"] for check in record["checks"]] == ["append"]
    assert not record["complete"]


@pytest.mark.parametrize("kernel", ["decode", "append", "decode, kivi 4", "transfers"])
def test_a_kernel_that_is_wrong_is_found(kernel, monkeypatch):
    right = gpu_checks.KERNELS[kernel]

    def wrong(case, backend):
        first, *others = right(case, backend)
        if backend == "triton":
            first.view(-1)[0] += 1
        return first, *others

    assert gpu_checks.run(kernel, CASE).passed
    monkeypatch.setitem(gpu_checks.KERNELS, kernel, wrong)
    check = gpu_checks.run(kernel, CASE)
    assert not check.passed
    assert check.error >= 0.99


def test_a_kernel_that_does_not_run_is_a_failure_and_ends_nothing(out, monkeypatch):
    def fails(case, backend):
        raise RuntimeError("out of shared memory")

    monkeypatch.setitem(gpu_checks.KERNELS, "append", fails)
    check = gpu_checks.run("append", CASE)
    assert not check.passed
    assert "out of shared memory" in check.message
    record = gpu_run.Record(gpu_run.Settings.tiny(1), out, checks=[check])
    assert record.failed == ["append"]


def test_what_ran_side_by_side_is_a_share_of_the_shorter():
    ms = {"copies": 4.0, "work": 10.0}
    for both, share in ((14.0, 0.0), (10.0, 1.0), (11.0, 0.75)):
        spreads = {name: Spread.of([value]) for name, value in (ms | {"tamis": both}).items()}
        assert gpu_times.Timing("x", {}, spreads, 1.0).overlap == share
    del spreads["work"]
    assert gpu_times.Timing("x", {}, spreads, 1.0).overlap is None


def test_who_cannot_be_timed_has_an_error():
    def fails():
        raise RuntimeError("no compiler")

    item = gpu_times.Item({}, {"tamis": lambda: None, "other": fails}, moved=8)
    rates = gpu_times.Rates(1e9, {})
    timing = gpu_times.time_item("x", lambda: item, rates, gpu_times.Sizes.tiny(), "cpu")
    assert timing.errors == {"other": "RuntimeError: no compiler"}
    assert timing.of_limit > 0
    assert timing.ratio("other") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
