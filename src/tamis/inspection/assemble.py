"""From what the engine recorded to an `Inspection`."""

from __future__ import annotations

from tamis.engine.outputs import RequestOutput
from tamis.engine.trace import Trace
from tamis.inspection.result import Inspection
from tamis.inspection.texts import token_texts
from tamis.model import Model
from tamis.plan import Plan


def assemble(
    model: Model, page_size: int, plan: Plan, trace: Trace, output: RequestOutput
) -> Inspection:
    """The inspection of a request that has ended.

    Args:
        model: what it ran on.
        page_size: tokens per page.
        plan: its plan.
        trace: what was recorded.
        output: what it handed back.
    """
    prompt = output.prompt_token_ids
    windows = tuple(layer.window for layer in model.layers)
    density = tuple(
        trace.pairs.get(i, 0.0) / _causal_pairs(len(prompt), window)
        for i, window in enumerate(windows)
    )
    return Inspection(
        model=model.name,
        plan=str(plan),
        prompt_token_ids=tuple(prompt),
        prompt_texts=token_texts(model.tokenizer, prompt),
        output_token_ids=tuple(output.token_ids),
        output_text=output.text,
        positions=tuple(map(tuple, trace.positions)),
        budgets=None if trace.budgets is None else tuple(map(tuple, trace.budgets)),
        bytes=tuple(trace.bytes),
        dense_bytes=tuple(trace.dense_bytes),
        reads=tuple(trace.reads),
        density=density,
        windows=windows,
        page_size=page_size,
        metrics=output.metrics,
    )


def _causal_pairs(n_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees among `n_tokens` tokens."""
    w = n_tokens if window is None else min(window, n_tokens)
    return w * (w + 1) // 2 + (n_tokens - w) * w
