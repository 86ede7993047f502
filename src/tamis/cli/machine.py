"""What this machine offers: what it says of itself, and what a quick measurement finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from tamis.attention import backends
from tamis.platform import available_memory, cpu_features, default_dtype

INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_vnni": "AVX512-VNNI",
    "amx": "AMX",
}
"""What kernels look for, by its name in `CpuFeatures` and its usual name."""

_READ_BYTES = 1 << 28  # far more than any cache holds
_MATMUL_SIZE = 1024
_SECONDS_EACH = 0.25


@dataclass(frozen=True)
class Machine:
    """The machine as this process sees it. Sizes in bytes.

    Attributes:
        cpu: the processor's model name.
        cores: cores that this process may use.
        instruction_sets: those of INSTRUCTION_SETS it has, by their usual names.
        memory: installed; memory_available: what can be allocated now.
        gpus: names of CUDA devices.
        torch: its version; threads: those it computes with.
        auto_dtype: what `dtype="auto"` means here.
        backends: the implementations of attention, and whether each can run.
    """

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory: int
    memory_available: int
    gpus: tuple[str, ...]
    torch: str
    threads: int
    auto_dtype: str
    backends: dict[str, bool]


@dataclass(frozen=True)
class Rates:
    """What limits inference here, measured.

    Attributes:
        read_bytes_per_s: reading memory that no cache holds, with all threads.
        matmul_fp32_flops, matmul_bf16_flops: multiplying square matrices, operations per second.
    """

    read_bytes_per_s: float
    matmul_fp32_flops: float
    matmul_bf16_flops: float


def this_machine() -> Machine:
    """What the machine says of itself."""
    cpu = cpu_features()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Machine(
        cpu=cpu.model,
        cores=cpu.cores,
        instruction_sets=tuple(
            usual for name, usual in INSTRUCTION_SETS.items() if getattr(cpu, name)
        ),
        memory=psutil.virtual_memory().total,
        memory_available=available_memory(),
        gpus=tuple(gpus),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        auto_dtype=str(default_dtype("cuda" if gpus else "cpu")).removeprefix("torch."),
        backends=backends(),
    )


def measure_rates() -> Rates:
    """Measure the CPU for about a second: the best of as many tries as fit."""
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    read_s = _best_seconds(memory.sum)
    square = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    half = square.bfloat16()
    operations = 2 * _MATMUL_SIZE**3
    return Rates(
        read_bytes_per_s=_READ_BYTES / read_s,
        matmul_fp32_flops=operations / _best_seconds(lambda: square @ square),
        matmul_bf16_flops=operations / _best_seconds(lambda: half @ half),
    )


def _best_seconds(work: Callable[[], object]) -> float:
    work()  # the first run pays for pages, threads and code
    best, end = float("inf"), time.perf_counter() + _SECONDS_EACH
    while (start := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - start)
    return best
