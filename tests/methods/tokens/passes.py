"""Runs programs of passes as the engine does, over attention that is made up."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from tamis.methods.views import LayerShape, ModelShape, Pass, PassResult


def model(n_layers: int, q_heads: int = 4) -> ModelShape:
    """A model of so many layers, two query heads to a KV head."""
    layer = LayerShape(q_heads, q_heads // 2, 8, 8)
    return ModelShape((layer,) * n_layers, vocab_size=16, dtype=torch.float32)


class Request:
    """A request whose attention at every layer is given by random products.

    Attributes:
        products: scaled products of queries and keys, [layers, q_heads, tokens, tokens].
        held: per layer the tokens that it caches.
        waiting: per layer the tokens that wait at its input.
    """

    def __init__(self, seed: int, n_layers: int, tokens: int, *, q_heads: int = 4) -> None:
        """`tokens` counts those of the prompt and all that will be generated."""
        draw = torch.Generator().manual_seed(seed)
        self.shape = model(n_layers, q_heads)
        self.products = 2 * torch.randn(n_layers, q_heads, tokens, tokens, generator=draw)
        self.held: list[set[int]] = [set() for _ in range(n_layers)]
        self.waiting: list[set[int]] = [set() for _ in range(n_layers + 1)]

    def cached(self) -> list[Tensor]:
        """What `Tokens.step` is given."""
        return [torch.tensor(sorted(held), dtype=torch.int64) for held in self.held]

    def weights(self, layer: int, query: int, keys: list[int]) -> Tensor:
        """Softmax over those of the keys that the query may see, [q_heads, keys]."""
        at = torch.tensor(keys)
        products = self.products[layer, :, query][:, at]
        return products.masked_fill(at > query, -torch.inf).softmax(-1)

    def run(self, program: Generator[Pass, PassResult, None]) -> list[Pass]:
        """Run a program to its end; the passes that it asked for."""
        passes = []
        try:
            current = next(program)
            while True:
                passes.append(current)
                current = program.send(self._result(current))
        except StopIteration:
            return passes

    def _result(self, one: Pass) -> PassResult:
        tokens, first = one.tokens.tolist(), one.layers[0]
        assert tokens == sorted(set(tokens)), "tokens must ascend"
        assert tokens, "a pass without tokens"
        if first > 0:
            assert set(tokens) <= self.waiting[first], "a token goes on from where it is not"
            self.waiting[first] -= set(tokens)
        for layer in one.layers:
            assert not self.held[layer] & set(tokens), "a token runs a layer twice"
            self.held[layer] |= set(tokens)
        if one.sees is not None:
            assert set(one.sees.tolist()) <= self.held[first], "sees what no layer of it holds"
        self.waiting[one.layers[-1] + 1] |= set(tokens)
        result = PassResult(None, None)
        if one.observe:
            layer = one.layers[-1]
            keys = sorted(self.held[layer])
            rows = [self.weights(layer, query, keys) for query in tokens[-one.observe :]]
            result = PassResult(torch.stack(rows, 1), torch.tensor(keys))
        if not one.keep:
            for layer in one.layers:
                self.held[layer] = set()
        return result


def best(scores: dict[int, float], count: int) -> list[int]:
    """The tokens of highest score, of equal ones the earlier, ascending."""
    return sorted(sorted(scores, key=lambda token: (-scores[token], token))[:count])
