"""MInference: every head computes the pattern that was found for it, filled in per chunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tamis.attention.pattern import SparsePattern
from tamis.errors import PlanError
from tamis.methods.base import Prefill, param
from tamis.methods.prefill.patterns import VERTICAL_SLASH, head_patterns
from tamis.methods.views import ChunkView, ModelShape


@dataclass(frozen=True)
class MInference(Prefill):
    """Each head has one of three patterns, chosen offline, whose indices are estimated online.

    - A-shape: the first `sinks` keys and the last `window`.
    - vertical-slash: softmax weights of the last 64 queries are summed per key and per diagonal;
      the keys ("verticals") and diagonals ("slashes") of largest sums are computed.
    - block-sparse: for each block of 64 queries the key blocks of largest products of mean query
      and mean key, and its own.

    (MInference 1.0, algorithms 1 to 3.) `tamis train minference` writes the kinds and
    sizes of all heads; without its file every head is vertical-slash with `verticals` and
    `slashes`, the reference code's default. A head whose lines or blocks are as many as its keys
    computes everything.

    Departures: a chunk of the prompt estimates from its own last queries, so chunks find patterns
    of their own. A slash is computed in the blocks of the key grid that it crosses, which the
    reference shifts along with it: up to twice as much, never less. A query block of a block-sparse
    head always computes its own tokens, so that no query sees nothing. Layers with a sliding window
    are left alone.
    """

    paper: ClassVar[str] = (
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse "
        "Attention (arXiv:2407.02490)"
    )
    verticals: int = param(1000, "keys of heads that were not fitted", minimum=1)
    slashes: int = param(6096, "diagonals of heads that were not fitted", minimum=1)
    last_q: int = param(64, "last queries that estimate", minimum=1)
    block: int = param(64, "tokens per block", minimum=1)
    path: str = param("", "fitted file; by default <model>/tamis/minference.safetensors")

    def pattern(self, view: ChunkView) -> SparsePattern | None:
        layer = view.shape.layers[view.layer]
        if layer.window is not None:
            return None
        if "minference" not in view.state:
            view.state["minference"] = self._fitted(view.shape)
        fitted = view.state["minference"]
        if fitted is None:
            kind = torch.full((layer.q_heads,), VERTICAL_SLASH)
            size = torch.tensor([self.verticals, self.slashes]).expand(layer.q_heads, 2)
        else:
            kind, size = (one[view.layer, : layer.q_heads] for one in fitted)
        device = view.lengths.device
        return head_patterns(
            view, kind.to(device), size.to(device), block=self.block, last_q=self.last_q
        )

    def _fitted(self, shape: ModelShape) -> tuple[Tensor, Tensor] | None:
        """Kinds [layers, q_heads] and sizes [layers, q_heads, 2] of all heads, if there are any."""
        file = Path(self.path)
        if not self.path:
            if shape.directory is None:
                return None
            file = shape.directory / "tamis" / "minference.safetensors"
            if not file.is_file():
                return None
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise PlanError(f"minference cannot read the patterns in {file}: {error}") from error
        heads = (shape.n_layers, max(layer.q_heads for layer in shape.layers))
        got = [tuple(found[name].shape) for name in ("kind", "size") if name in found]
        if got != [heads, (*heads, 2)]:
            raise PlanError(
                f"minference needs kind {list(heads)} and size {[*heads, 2]} in {file}: it was "
                "fitted for another model; run `tamis train minference` for this one"
            )
        return found["kind"], found["size"]
