"""Rows of a forward that run through some of the decoder layers only.

A row (one token's hidden state) may leave before the last layer, and another forward may take it
up where it left. `passing` does it from outside, with hooks that are registered for one forward:
before each decoder layer the hidden states are reduced to the rows of that layer, and so is
every other argument that has one entry per row. Between two layers whose rows are the same,
nothing is copied, and a layer without rows computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tamis.model.layers import layer_input, skipped


@dataclass(frozen=True)
class RowRanges:
    """The decoder layers that each row of a forward runs through.

    Attributes:
        first: int64 [tokens], the first layer of each row, counted from 0.
        last: int64 [tokens], its last layer, included.
        hidden: [m, hidden_size], what the m rows with `first` > 0 are at the input of their first
            layer, in row order; None if there is none. A row with `first` 0 starts from its
            token's embedding.

    `first` and `last` are read on the CPU: there they cost no synchronization.
    """

    first: Tensor
    last: Tensor
    hidden: Tensor | None = None

    def check(self, n_tokens: int, n_layers: int, hidden_size: int, logits_at: Tensor) -> None:
        """Raise ValueError unless these ranges fit such a forward, in their values and shapes."""
        shapes = [list(self.first.shape), list(self.last.shape)]
        if shapes != [[n_tokens], [n_tokens]]:
            raise ValueError(
                f"first and last must be [tokens] = [{n_tokens}], not {shapes[0]}, {shapes[1]}"
            )
        first, last = self.first.cpu(), self.last.cpu()
        wrong = ((first < 0) | (first > last) | (last >= n_layers)).nonzero()[:, 0].tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(
                f"row {row} cannot run layers {first[row]} to {last[row]}; ranges must lie within "
                f"0 to {n_layers - 1}"
            )
        shape = [0, hidden_size] if self.hidden is None else list(self.hidden.shape)
        expected = [int((first > 0).sum()), hidden_size]
        if shape != expected:
            raise ValueError(
                f"hidden must be {expected}, one row per row that enters late, not {shape}"
            )
        gone = (last[logits_at.cpu()] < n_layers - 1).nonzero()[:, 0].tolist()
        if gone:
            raise ValueError(
                f"row {int(logits_at[gone[0]])} has no logits: it leaves before the last layer"
            )


class Passage:
    """The rows of one forward on their way through the decoder layers."""

    def __init__(self, rows: RowRanges, n_layers: int) -> None:
        self._first, self._last = rows.first.cpu(), rows.last.cpu()
        self._hidden = rows.hidden
        self._n_layers = n_layers
        # A row's place among the rows that enter late, and among those that leave early.
        self._enters_at = (self._first > 0).cumsum(0) - 1
        self._leaves_at = (self._last < n_layers - 1).cumsum(0) - 1
        self._here = torch.arange(len(self._first))  # the rows that are in the hidden states now
        self._index: Tensor | None = None  # the same on the model's device, None if it is all rows
        self._left: Tensor | None = None

    @property
    def left(self) -> Tensor:
        """Hidden states [k, hidden_size] of the rows that left early, in row order, as they left.

        To be asked for when the forward is over.
        """
        assert self._left is not None
        return self._left

    def any_in(self, layer: int) -> bool:
        """Whether any row runs through `layer`."""
        return bool(self._in(layer).any())

    def _in(self, layer: int) -> Tensor:
        """Which rows run through `layer`, bool [tokens]."""
        return (self._first <= layer) & (self._last >= layer)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """A layer's input [1, rows of the layer, hidden_size], made of the output before it."""
        if self._left is None:
            n_leaving = int((self._last < self._n_layers - 1).sum())
            self._left = hidden.new_empty(n_leaving, hidden.shape[-1])
        leaving = self._last[self._here] == layer - 1
        self._left[self._leaves_at[self._here[leaving]]] = hidden[0, leaving]
        here = self._in(layer).nonzero()[:, 0]
        if torch.equal(here, self._here):
            return hidden
        entering = (self._first[here] == layer) & (layer > 0)
        staying = (self._first[self._here] <= layer) & ~leaving
        new = hidden.new_empty(1, len(here), hidden.shape[-1])
        new[0, ~entering] = hidden[0, staying]
        if self._hidden is not None:
            new[0, entering] = self._hidden[self._enters_at[here[entering]]].to(new.dtype)
        self._here = here
        self._index = None if len(here) == len(self._first) else here.to(hidden.device)
        return new

    def select(self, value: Any) -> Any:
        """`value` with every tensor that has an entry per row reduced to the rows that are here.

        Such tensors are [1, tokens, ...] or [tokens, ...], alone or in tuples, lists and dicts.
        """
        if self._index is None:
            return value
        if isinstance(value, Tensor):
            n_rows = len(self._first)
            if value.ndim > 1 and value.shape[:2] == (1, n_rows):
                return value.index_select(1, self._index)
            per_row = value.ndim > 0 and value.shape[0] == n_rows
            return value.index_select(0, self._index) if per_row else value
        if type(value) in (tuple, list):
            return type(value)(self.select(item) for item in value)
        if type(value) is dict:
            return {key: self.select(item) for key, item in value.items()}
        return value

    def spread(self, hidden: Tensor) -> Tensor:
        """The last layer's output with its rows at their own numbers [1, tokens, hidden_size].

        What comes after the layers may rely on the number of tokens; the other rows are zero.
        """
        if self._index is None:
            return hidden
        every = hidden.new_zeros(1, len(self._first), hidden.shape[-1])
        return every.index_copy_(1, self._index, hidden)


@contextmanager
def passing(layers: Sequence[nn.Module], rows: RowRanges) -> Iterator[Passage]:
    """Within the context, one forward runs each row through its own range of `layers`.

    Args:
        layers: the model's decoder layers, in order.
        rows: as `RowRanges.check` has found it right.

    The hooks are registered for the context only.
    """
    passage = Passage(rows, len(layers))

    def before(
        layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = passage.enter(layer, layer_input(args, kwargs))
        if args:
            return (hidden, *passage.select(args[1:])), passage.select(kwargs)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return args, {"hidden_states": hidden} | passage.select(others)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return passage.spread(output)

    idle = [layer for i, layer in enumerate(layers) if not passage.any_in(i)]
    with skipped(idle), ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hook = partial(before, i)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        hooks.enter_context(layers[-1].register_forward_hook(after))
        yield passage
