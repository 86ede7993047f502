"""An inspection made by hand: two layers, the second with a window, of two KV heads each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tamis.engine.outputs import RequestMetrics
from tamis.engine.trace import ReadStep
from tamis.inspection import Inspection

TEXTS = ("The ", "code ", "is ", "4", "2", ".\n", "<b>", "Which", "?", "")


def numbers(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def metrics(**changes: Any) -> RequestMetrics:
    return replace(
        RequestMetrics(
            prompt_tokens=10,
            output_tokens=3,
            queue_s=0.0,
            ttft_s=0.1,
            tpot_s=0.01,
            total_s=0.2,
            kv_bytes=1536,
            kv_bytes_peak=2560,
            kv_bytes_dense=3072,
            preemptions=0,
        ),
        **changes,
    )


@pytest.fixture
def inspection() -> Inspection:
    """Pages of 2 tokens; the answer "42" lies in head 0 of layer 0 alone, in its page 1."""
    reads = []
    for step in range(2):
        reads += [
            ReadStep(step, 0, (2, 2), (7 + step, 4 + step), pages=((step, 3), (0, 1))),
            ReadStep(step, 1, (4, 4), (4, 4)),
        ]
    return Inspection(
        model="tiny",
        plan="</script><b>odd",
        prompt_token_ids=tuple(range(10)),
        prompt_texts=TEXTS,
        output_token_ids=(1, 2, 3),
        output_text="<i>42</i>",
        positions=(
            (numbers(0, 1, 3, 4, 8, 9, 10, 11), numbers(0, 8, 9, 10, 11)),
            (numbers(8, 9, 10, 11), numbers(8, 9, 10, 11)),
        ),
        budgets=((6, 3), (4, 4)),
        bytes=({"live": 512, "codec": 512}, {"live": 512}),
        dense_bytes=(2048, 1024),
        reads=tuple(reads),
        density=(0.5, 1.0),
        windows=(None, 4),
        page_size=2,
        metrics=metrics(),
    )
