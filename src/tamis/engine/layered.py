"""A step's sequences, layer by layer: not every sequence runs every layer in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.cache import BatchView, PagedCache, SequenceCache
from tamis.engine.attend import StepAttention
from tamis.engine.lifecycle import Lifecycle


class Member(NamedTuple):
    """One sequence of a step.

    Attributes:
        cache: its pages; n_tokens: of the step, which are reserved or lie there already.
        life: its plan at work, None for exact attention.
        tree: which of its tokens each sees, bool [n_tokens, n_tokens], if they are a draft.
        layers: those that it runs, None for all.
    """

    cache: SequenceCache
    n_tokens: int
    life: Lifecycle | None
    tree: Tensor | None
    layers: range | None


class StepBatch:
    """What the layers of a model call back in one step.

    Args:
        cache: where the sequences' pages lie.
        members: the sequences, in the order of the step's tokens; see `StepAttention`.
        positions: of all tokens, int32 [tokens].
    """

    def __init__(self, cache: PagedCache, members: Sequence[Member], positions: Tensor) -> None:
        self._cache = cache
        self._members = members
        self._positions = positions
        self._parts: dict[tuple[int, ...], StepAttention] = {}
        self._all = tuple(range(len(members)))
        self._whole = all(member.layers is None for member in members)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of one layer for the tokens that run it; see `tamis.model.Attend`."""
        return self._of(self._running(layer))(layer, q, k, v, **options)

    def measure(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Tell the plans that ask what a layer's attention did to the hidden states."""
        at = 0
        for i in self._running(layer):
            member = self._members[i]
            own = slice(at, at + member.n_tokens)
            at = own.stop
            if member.life is not None and member.life.plan.needs.similarity:
                member.life.measure(layer, before[own], after[own])

    def _running(self, layer: int) -> tuple[int, ...]:
        """The sequences that run a layer."""
        if self._whole:
            return self._all
        members = enumerate(self._members)
        return tuple(i for i, member in members if member.layers is None or layer in member.layers)

    def _of(self, running: tuple[int, ...]) -> StepAttention:
        """The attention of some of the sequences."""
        if running not in self._parts:
            members = [self._members[i] for i in running]
            counts = [member.n_tokens for member in members]
            positions = self._positions
            if len(running) < len(self._members):
                ends = torch.tensor([m.n_tokens for m in self._members]).cumsum(0).tolist()
                spans = [(ends[i] - self._members[i].n_tokens, ends[i]) for i in running]
                positions = torch.cat([positions[start:end] for start, end in spans])
            lives = [member.life for member in members]
            there = [life is not None and life.fresh is not None for life in lives]
            caches = [member.cache for member in members]
            view = BatchView(self._cache, caches, counts, positions, there)
            trees = [member.tree for member in members]
            self._parts[running] = StepAttention(view, counts, positions, lives, trees)
        return self._parts[running]
