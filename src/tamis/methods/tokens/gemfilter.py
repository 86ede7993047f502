"""GemFilter: an early layer picks the tokens that the whole model then reads."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Tokens, budget_param, param, resolve
from tamis.methods.tokens.choice import best_and_last
from tamis.methods.views import ModelShape, Pass, PassResult


@dataclass(frozen=True)
class GemFilter(Tokens):
    """Runs the prompt through its first layers, and then only the tokens to which its last token
    attends there through the whole model, as if they were the prompt.

    At layer `r`, with `q_h` the last token's query and `K_h` the keys of head `h` (algorithm 1),

        chosen = the `budget` tokens of largest  avgpool_kernel(sum_h K_h q_h),  in their order

    The tokens chosen start again at layer 0, at positions 0, 1, 2, ...; what the first run cached
    is dropped. Defaults: 1,024 tokens of those that the paper tries, a window of 5 tokens for
    pooling as in the reference code, and layer 13 of the 32 of Llama 3.1, written as a share so
    that it fits models of any depth.

    Departures. The products come from attention weights, `log softmax(x) = x - log sum exp x`: they
    differ from the paper's by a constant per head, which changes no order. So that it changes none
    at the ends either, the mean there is over the tokens that exist, where the reference code
    counts zeros beyond them. A token whose weight underflows (1e-38) or that the layer's sliding
    window hides counts as that weight. The last token is always one of the chosen, since generation
    goes on from it.
    """

    paper: ClassVar[str] = (
        "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input "
        "Token Reduction (arXiv:2409.17422)"
    )
    query_dependent: ClassVar[bool] = True

    layer: int | float = param(
        0.4, "the layer that chooses, from 0, or (a decimal) its share of the depth", minimum=0
    )
    budget: int | float = budget_param(1024)
    kernel: int = param(5, "tokens over which scores are averaged, an odd number", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise PlanError(f"{self}: kernel must be odd, so that it has a middle")

    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        """A pass that chooses and one of what it chose; one of everything if the budget holds it.

        Raises:
            PlanError: the model has no such layer.
        """
        return self._passes(prompt_tokens, self._layer_of(shape), shape.n_layers)

    def _passes(
        self, prompt_tokens: int, layer: int, n_layers: int
    ) -> Generator[Pass, PassResult, None]:
        tokens = torch.arange(prompt_tokens)
        budget = resolve(self.budget, prompt_tokens)
        if budget >= prompt_tokens:
            yield Pass(tokens, range(n_layers))
            return
        seen = yield Pass(tokens, range(layer + 1), keep=False, observe=1)
        assert seen.weights is not None
        chosen = best_and_last(tokens, self._scores(seen.weights[:, -1]), budget)
        yield Pass(chosen, range(n_layers), positions=torch.arange(len(chosen)))

    def _layer_of(self, shape: ModelShape) -> int:
        """The layer that chooses.

        Raises:
            PlanError: the model has no such layer.
        """
        last = shape.n_layers - 1
        if isinstance(self.layer, float):
            return min(round(self.layer * shape.n_layers), last)
        if self.layer > last:
            raise PlanError(
                f"{self}: the model has {shape.n_layers} layers, so layer must be at most {last}"
            )
        return self.layer

    def _scores(self, weights: Tensor) -> Tensor:
        """Pooled sums over heads of the products behind weights [q_heads, tokens]: fp32 [tokens].

        In fp64, since the sum over many heads of large terms would blur small differences.
        """
        products = weights.clamp_min(torch.finfo(torch.float32).tiny).double().log().sum(0)
        pooled = F.avg_pool1d(
            products[None],
            self.kernel,
            stride=1,
            padding=self.kernel // 2,
            count_include_pad=False,
        )
        return pooled[0].float()
