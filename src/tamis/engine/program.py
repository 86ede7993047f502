"""A program of passes at work on one sequence: which tokens run through which layers next."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis.attention import observe
from tamis.engine import blend
from tamis.methods.views import Pass, PassResult

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle

Passes = Generator[Pass, PassResult, None]


class Aside:
    """Hidden states of tokens that left before the last layer, and which tokens each layer holds.

    Attributes:
        hidden: for a layer, the tokens that wait at its input, int64 [m], and their hidden states
            [m, hidden_size].
        held: per layer the tokens whose KV it holds, in the order of the cache, int64.
    """

    def __init__(self, n_layers: int) -> None:
        nothing = torch.zeros(0, dtype=torch.int64)
        self.hidden: dict[int, tuple[Tensor, Tensor]] = {}
        self.held: list[Tensor] = [nothing] * n_layers

    @property
    def waiting(self) -> list[Tensor]:
        """The hidden states of all layers."""
        return [hidden for _, hidden in self.hidden.values()]

    def waiting_bytes(self, layer: int) -> int:
        """Bytes of the hidden states that wait at a layer's input."""
        return self.hidden[layer][1].nbytes if layer in self.hidden else 0

    def forget_waiting(self) -> None:
        """Drop all hidden states: no token goes on."""
        self.hidden.clear()

    def keep_waiting(self, tokens: Tensor) -> None:
        """Drop the hidden states of all but these tokens."""
        for layer, (waiting, hidden) in self.hidden.items():
            kept = torch.isin(waiting, tokens)
            self.hidden[layer] = (waiting[kept], hidden[kept.to(hidden.device)])

    def put(self, layer: int, tokens: Tensor, hidden: Tensor) -> None:
        """Have tokens wait at a layer's input."""
        if layer in self.hidden:
            before, states = self.hidden[layer]
            tokens, hidden = torch.cat([before, tokens]), torch.cat([states, hidden])
        order = tokens.argsort()
        self.hidden[layer] = (tokens[order], hidden[order])

    def take(self, layer: int, tokens: Tensor) -> Tensor:
        """The hidden states of tokens (ascending) that wait at a layer's input; they stop waiting.

        Raises:
            ValueError: a token does not wait there.
        """
        waiting, hidden = self.hidden.get(layer, (tokens[:0], torch.empty(0)))
        chosen = torch.isin(waiting, tokens)
        if int(chosen.sum()) != len(tokens):
            missing = tokens[~torch.isin(tokens, waiting)].tolist()
            raise ValueError(f"tokens {missing[:8]} have not left at layer {layer}")
        self.hidden[layer] = (waiting[~chosen], hidden[~chosen.to(hidden.device)])
        return hidden[chosen.to(hidden.device)]

    def fork(self) -> Aside:
        """A copy that changes by itself; tensors are shared."""
        other = Aside(len(self.held))
        other.hidden, other.held = dict(self.hidden), list(self.held)
        return other


class Program:
    """Passes, one after the other, cut into chunks as the scheduler has room.

    Attributes:
        current: the pass at work.
        finished: whether the program has ended.
    """

    def __init__(self, passes: Passes, life: Lifecycle, n_layers: int) -> None:
        self._passes = passes
        self._life = life
        self._n_layers = n_layers
        self._done = 0
        self._deviations: list[Tensor] = []
        self.finished = False
        self.current = self._checked(next(passes))

    @property
    def remaining(self) -> int:
        """Tokens of the current pass that have not run."""
        return len(self.current.tokens) - self._done

    @property
    def whole(self) -> bool:
        """Whether the current pass ends at the last layer, where tokens may have logits."""
        return self.current.layers[-1] == self._n_layers - 1

    def tokens(self, n: int) -> Tensor:
        """The next `n` tokens of the pass, int64 [n]."""
        return self.current.tokens[self._done : self._done + n]

    def positions(self, n: int) -> Tensor:
        """Their positions, int64 [n]."""
        positions = self.current.positions
        return self.tokens(n) if positions is None else positions[self._done : self._done + n]

    def hidden(self, n: int) -> Tensor | None:
        """What the next `n` tokens are at the pass's first layer; None from the embedding."""
        first = self.current.layers[0]
        return None if first == 0 else self._life.aside.take(first, self.tokens(n))

    def advance(self, n: int, left: Tensor | None, keys_values: blend.KeysValues) -> None:
        """Count `n` tokens that ran; `left` [n, hidden] is what they were behind the last layer
        of the pass, None if that was the model's last. `turn` comes next."""
        life, layers = self._life, self.current.layers
        tokens = self.tokens(n)
        if life.fresh is None:
            for layer in layers:
                life.aside.held[layer] = torch.cat([life.aside.held[layer], tokens])
        if left is not None:
            following = layers[-1] + 1
            life.aside.put(following, tokens, left)
            if self.current.deviation:
                k, v = keys_values(following, left, self.positions(n).to(left.device))
                self._deviations.append(blend.deviation(life, following, tokens, k, v))
        self._done += n

    def turn(self) -> None:
        """If all tokens of the pass have run, hand its result to the program and take up the next
        pass, or end."""
        if self.remaining:
            return
        life, ended = self._life, self.current
        result = self._result()
        if not ended.keep:
            for layer in ended.layers:
                heads = life.shape.layers[layer].kv_heads
                life.cache.keep(layer, [torch.zeros(0, dtype=torch.int64).numpy()] * heads)
                life.aside.held[layer] = life.aside.held[layer][:0]
                life.layers[layer].queries = None
        last = ended.tokens[-1:] if ended.positions is None else ended.positions[-1:]
        life.cache.next_position = int(last) + 1
        try:
            following = self._passes.send(result)
        except StopIteration:
            self.finished = True
        else:
            self.current, self._done = self._checked(following), 0
            if life.fresh is not None:  # who does not go on here will not go on at all
                life.aside.keep_waiting(self.current.tokens)

    def _result(self) -> PassResult:
        """What was observed at the pass's last layer, or of the next one's keys and values."""
        if self._deviations:
            deviations, self._deviations = torch.cat(self._deviations), []
            return PassResult(None, None, deviations)
        if not self.current.observe:
            return PassResult(None, None)
        layer = self.current.layers[-1]
        life = self._life
        mine = life.layers[layer]
        options, watched = mine.options, mine.watched
        assert options is not None
        assert watched is not None
        q, positions = watched
        weights = observe.window_weights(
            q,
            life.cache.pages(layer),
            scale=options.scale,
            positions=positions,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )
        keys = life.aside.held[layer]
        order = keys.argsort()
        mine.watched = None
        return PassResult(weights[..., order.to(weights.device)], keys[order])

    def _checked(self, one: Pass) -> Pass:
        """The pass, if it can run.

        Raises:
            ValueError: tokens do not ascend, or the layers are not consecutive ones of the model.
        """
        layers = one.layers
        if not len(one.tokens) or not bool((one.tokens.diff() > 0).all()):
            raise ValueError(f"a pass needs ascending tokens, got {one.tokens}")
        if not layers or layers.step != 1 or layers[0] < 0 or layers[-1] >= self._n_layers:
            raise ValueError(f"a pass needs consecutive layers of {self._n_layers}, got {layers}")
        return one
