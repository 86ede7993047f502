"""What the machine offers, sizes and dtypes as users write them, and the choice of a backend."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from tamis import platform
from tamis.errors import ConfigError, TamisWarning


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4GiB", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5kib", 1536),
        ("3GB", 3 * 10**9),
        ("2MB", 2 * 10**6),
        ("7KB", 7000),
        ("123", 123),
        ("64B", 64),
        (4096, 4096),
    ],
)
def test_sizes_are_parsed(text: str | int, n_bytes: int) -> None:
    assert platform.parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "4 gigs", "GiB", "-1GiB", "0", 0, -5, "1e9", "4GiBB", "0.1B"])
def test_malformed_sizes_are_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r'malformed memory size .* e\.g\. "4GiB"'):
        platform.parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (3 * 2**40, "3 TiB")],
)
def test_sizes_are_formatted(n_bytes: int, text: str) -> None:
    assert platform.format_bytes(n_bytes) == text
    assert n_bytes == 0 or platform.parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_dtypes_are_parsed(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert platform.parse_dtype(name) is dtype


@pytest.mark.parametrize("name", ["int8", "", "BF16 ", torch.int8, None])
def test_unknown_dtypes_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="use one of auto, bf16, bfloat16, fp16"):
        platform.parse_dtype(name)


def test_auto_is_bf16_where_the_hardware_multiplies_it() -> None:
    cpu = platform.cpu_features()
    fast = cpu.amx or cpu.avx512_bf16
    assert platform.parse_dtype("auto", "cpu") is (torch.bfloat16 if fast else torch.float32)
    assert platform.parse_dtype("auto", "cuda") is torch.bfloat16


def test_available_memory_is_what_can_be_allocated() -> None:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    assert 0 < platform.available_memory("cpu") <= page * pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's own list")
def test_cpuid_agrees_with_the_system() -> None:
    extension = platform.native_module(warn=False)
    if extension is None:
        pytest.skip("the extension is not built")
    _, listed = platform._listed_cpu()
    found = extension.cpu_features()
    assert listed["amx"] or not found["amx"]  # the system may refuse a process its tiles
    assert found | {"amx": listed["amx"]} == listed
    assert platform.cpu_features().cores == len(os.sched_getaffinity(0))


def test_kernels_run_where_the_processor_has_what_they_need() -> None:
    extension = platform.native_module(warn=False)
    if extension is None:
        pytest.skip("the extension is not built")
    found, isas = extension.cpu_features(), extension.isas()
    pairs = found["avx512_bf16"] and found["avx512_vnni"]
    needs = {
        "portable": True,
        "avx2": found["avx2"],
        "avx512": found["avx512"],
        "avx512_bf16": pairs,
        "amx": pairs and found["amx"],
    }
    assert [name for name in isas if name != "amx_emulated"] == [
        name for name, has in needs.items() if has
    ]
    assert found["amx"] == needs["amx"]
    for name in {*needs, "amx_emulated", "sse9"} - set(isas):
        with pytest.raises(ValueError, match=f"does not run the instruction set {name}"):
            extension.gate(isa=name, threads=1, dtype=0, n=0, gates=0, ups=0)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the extension could not be compiled."""
    monkeypatch.setitem(sys.modules, "tamis._native", None)
    platform.native_module.cache_clear()
    yield
    platform.native_module.cache_clear()


@pytest.mark.usefixtures("without_extension")
def test_a_missing_extension_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAMIS_BACKEND", raising=False)
    operand = torch.zeros(1)
    with pytest.warns(TamisWarning, match="install a C\\+\\+17 compiler"):
        assert platform.native_for(None, operand) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert platform.native_for(None, operand) is None


@pytest.mark.usefixtures("without_extension")
@pytest.mark.filterwarnings("ignore::tamis.errors.TamisWarning")
def test_asking_for_a_missing_extension_is_refused() -> None:
    with pytest.raises(ConfigError, match="the extension is not installed"):
        platform.native_for("native", torch.zeros(1))


@pytest.mark.usefixtures("without_extension")
@pytest.mark.filterwarnings("ignore::tamis.errors.TamisWarning")
def test_without_the_extension_features_come_from_the_system() -> None:
    features = platform.cpu_features.__wrapped__()
    assert features == platform.cpu_features()


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    operand = torch.zeros(1)
    monkeypatch.setenv("TAMIS_BACKEND", "unknown")
    assert platform.native_for("reference", operand) is None
    monkeypatch.setenv("TAMIS_BACKEND", "reference")
    assert platform.native_for(None, operand) is None


def test_native_off_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="the operands are not on the CPU"):
        platform.native_for("native", torch.zeros(1, device="meta"))
    assert platform.native_for(None, torch.zeros(1, device="meta")) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_torch_and_the_extension_share_one_openmp_runtime() -> None:
    """Two runtimes would each start their own threads and fight for the cores."""
    if importlib.util.find_spec("tamis._native") is None:
        pytest.skip("the extension is not built")
    # In a process of its own: other libraries of this one may bring a runtime along.
    source = (
        "from tamis import platform; platform.native_module(); "
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    lines = maps.stdout.splitlines()
    runtimes = {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}
    assert len(runtimes) <= 1
