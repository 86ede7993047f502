"""An `Attend` that is obviously right: keeps every key and value, builds every mask."""

from __future__ import annotations

import torch
from torch import Tensor


class NaiveAttend:
    """Attention over the tokens seen so far of each sequence, in fp32.

    Before a forward, set `owners` to the sequence and `positions` to the position of each token.
    """

    def __init__(self) -> None:
        self.owners: list[int] = []
        self.positions: list[int] = []
        # (layer, sequence) -> positions, keys and values of its tokens so far
        self.past: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.layers_called: list[int] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.layers_called.append(layer)
        owners, positions = torch.tensor(self.owners), torch.tensor(self.positions)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for owner in owners.unique().tolist():
            mine = (owners == owner).nonzero()[:, 0]
            new = (positions[mine], k[mine].float(), v[mine].float())
            past = self.past.get((layer, owner))
            at, keys, values = new if past is None else map(torch.cat, zip(past, new, strict=True))
            self.past[layer, owner] = (at, keys, values)
            behind = positions[mine][:, None] - at  # [new tokens, cached tokens]
            seen = (behind >= 0) & (behind < (window or len(at)))
            group = q.shape[1] // k.shape[1]
            keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
            scores = torch.einsum("thd,nhd->htn", q[mine].float(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                extra = sinks.float()[:, None, None].expand(-1, len(mine), 1)
                scores = torch.cat([scores, extra], dim=2)
            weights = scores.softmax(dim=2)[:, :, : len(at)]
            out[mine] = torch.einsum("htn,nhd->thd", weights, values).to(out.dtype)
        return out
