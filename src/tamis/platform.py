"""What this machine offers: processor, memory, dtypes, and the compiled kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import psutil
import torch

from tamis.errors import ConfigError, TamisWarning

BACKENDS = ("reference", "native", "triton")
"""The implementations of every kernel: plain torch, and C++ for the CPU."""

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
"""The dtypes a model may run in, by each name that is accepted for them."""

NATIVE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The numbers by which the compiled kernels know dtypes (`DType` in native/element.h)."""

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class CpuFeatures:
    """The processor, as far as kernels care.

    Attributes:
        model: vendor and model name, e.g. "AMD EPYC".
        cores: cores this process may use.
        avx2: AVX2 with FMA and F16C.
        avx512: AVX-512 F, BW, DQ and VL.
        avx512_bf16: AVX-512 dot products of bf16 pairs.
        avx512_vnni: AVX-512 dot products of int8.
        amx: AMX tiles of bf16.
    """

    model: str
    cores: int
    avx2: bool
    avx512: bool
    avx512_bf16: bool
    avx512_vnni: bool
    amx: bool


@cache
def cpu_features() -> CpuFeatures:
    """The processor's features: from cpuid through the extension, else from the system's list."""
    model, listed = _listed_cpu()
    extension = native_module(warn=False)
    found = extension.cpu_features() if extension is not None else listed
    return CpuFeatures(
        model=model,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        **{
            name: bool(found.get(name, False))
            for name in ("avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx")
        },
    )


def _listed_cpu() -> tuple[str, dict[str, bool]]:
    """Model name and features as Linux lists them; only the architecture's name elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    listed = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(listed.group(1).split()) if listed else set()
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "avx512_vnni": {"avx512_vnni"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    model = name.group(1).strip() if name else platform.machine()
    return model, {feature: need <= flags for feature, need in needs.items()}


@cache
def native_module(warn: bool = True) -> ModuleType | None:
    """The compiled extension, or None where it is not installed.

    With `warn`, the first call says through a TamisWarning that the extension is missing and what
    to install.
    """
    try:
        # torch is imported above, so both share the one OpenMP runtime that torch has loaded.
        return importlib.import_module("tamis._native")
    except ImportError as error:
        if warn:
            warnings.warn(
                f"the native kernels are not available ({error}), so attention runs on the slower "
                "torch backend; install a C++17 compiler (e.g. `apt install g++`) and reinstall "
                "tamis to get them",
                TamisWarning,
                stacklevel=2,
            )
        return None


def native_for(backend: str | None, *tensors: torch.Tensor) -> ModuleType | None:
    """The extension where an operation on `tensors` is to run in it, None where it is not.

    Args:
        backend: a name of BACKENDS, or None for the environment's TAMIS_BACKEND if set, else the
            fastest: native where the extension is installed and every tensor is on the CPU.
        tensors: the operands.

    Raises:
        ConfigError: the name is unknown, or it is "native" where that cannot run.
    """
    asked = _asked(backend)
    if asked in ("reference", "triton"):
        return None
    on_cpu = all(tensor.is_cpu for tensor in tensors)
    extension = native_module() if on_cpu else None
    if asked and extension is None:
        why = "the extension is not installed" if on_cpu else "the operands are not on the CPU"
        raise ConfigError(f"the native backend was asked for, but {why}; use 'reference' here")
    return extension


def triton_for(backend: str | None, *tensors: torch.Tensor) -> bool:
    """Whether an operation on `tensors` that has a Triton kernel is to run in it.

    Args:
        backend: as `native_for` takes it; by default Triton runs where it is installed and every
            tensor is on a CUDA device.
        tensors: the operands.

    Raises:
        ConfigError: the name is unknown, or it is "triton" where that cannot run.
    """
    asked = _asked(backend)
    if asked in ("reference", "native"):
        return False
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if asked == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not triton_installed():
            raise ConfigError("the triton backend was asked for, but Triton is not installed")
        if not on_gpu and not interpreted:
            raise ConfigError(
                "the triton backend was asked for, but the operands are not on a CUDA device; use "
                "'native' or 'reference' here, or TRITON_INTERPRET=1 to try it slowly"
            )
        return True
    return on_gpu and triton_installed()


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _asked(backend: str | None) -> str | None:
    """The backend that an operation or else the environment names; None for neither.

    Raises:
        ConfigError: the name is unknown.
    """
    asked = backend or os.environ.get("TAMIS_BACKEND")
    if asked and asked not in BACKENDS:
        raise ConfigError(
            f"unknown backend {asked!r} (backend= or TAMIS_BACKEND): use one of "
            f"{', '.join(BACKENDS)}"
        )
    return asked or None


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that "auto" means: bf16 where `device` multiplies it in hardware, else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    cpu = cpu_features()
    return torch.bfloat16 if cpu.amx or cpu.avx512_bf16 else torch.float32


def parse_dtype(name: str | torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype called `name`; "auto" is `default_dtype(device)`.

    Raises:
        ConfigError: `name` is none of auto, bf16, bfloat16, fp16, float16, fp32, float32.
    """
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name == "auto":
        return default_dtype(device)
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    raise ConfigError(f"unknown dtype {name!r}: use one of auto, {', '.join(DTYPES)}")


def parse_bytes(size: str | int) -> int:
    """A number of bytes, from an int or from text such as "4GiB", "512 MB" or "1.5gib".

    Raises:
        ConfigError: `size` is malformed or not positive.
    """
    text = str(size).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match and match.group(2).lower() in _UNITS:
        number, unit = match.groups()
        scale = _UNITS[unit.lower()]
        n_bytes = int(number) * scale if number.isdigit() else int(float(number) * scale)
        if n_bytes > 0:
            return n_bytes
    raise ConfigError(
        f"malformed memory size {size!r}: use a positive number of bytes, or a number with "
        'KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), e.g. "4GiB"'
    )


def format_bytes(n_bytes: int) -> str:
    """`n_bytes` in the largest binary unit that keeps it at least 1, e.g. "1.5 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _UNITS[unit.lower()]
        if n_bytes >= scale:
            return f"{n_bytes / scale:.4g} {unit}"
    return f"{n_bytes} B"


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be allocated on `device` now; on the CPU, within the container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)
