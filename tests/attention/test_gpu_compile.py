"""The Triton kernels compile for GPUs, which takes none, and fit into what these have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tamis.platform import triton_installed

ROOT = Path(__file__).parents[2]

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program can have, by compute capability."""


@pytest.mark.slow
@pytest.mark.skipif(not triton_installed(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("capability", "dtype", "dim"), [(80, "bfloat16", 128), (90, "float32", 128)]
)
def test_every_kernel_compiles_and_fits(capability: int, dtype: str, dim: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.gpu_compile", str(capability), dtype, str(dim)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    taken = [json.loads(line) for line in done.stdout.splitlines()]
    names = {one["kernel"] for one in taken}
    assert names == {"_partial", "_merge", "_prefill", "_observe", "_bounds", "_append"}
    too_large = [one for one in taken if one["shared"] > SHARED[capability]]
    assert not too_large
