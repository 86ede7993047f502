"""What attention does to the hidden states of each layer.

Some methods weigh layers by how far attention turns the residual stream: SqueezeAttention
(arXiv 2404.04793, section 3) takes the cosine similarity of the hidden states before a layer's
attention and after its output has been added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tamis.model.layers import layer_input

Measure = Callable[[int, Tensor, Tensor], None]
"""Called with (layer, before [rows, hidden_size], after [rows, hidden_size]), in layer order."""


class Residual:
    """One layer's input, and what attention will add to it."""

    def __init__(self, layer: nn.Module) -> None:
        self._factor: float = getattr(layer, "residual_multiplier", 1.0)  # Granite's
        self.before: Tensor | None = None
        self.branch: Tensor | None = None

    @property
    def after(self) -> Tensor:
        """The hidden states [1, rows, hidden_size] with attention's output added."""
        assert self.before is not None
        assert self.branch is not None
        return self.before + self.branch * self._factor

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the layer's input (a hook before the layer)."""
        self.before = layer_input(args, kwargs)

    def attended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the attention's output (a hook after the attention)."""
        self.branch = output[0] if isinstance(output, tuple) else output  # weights come with it

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take `module`'s output instead if its input is what attention left (a hook after it).

        That is the norm that Gemma and OLMo 2 put between the attention and the residual.
        """
        if args and args[0] is self.branch:
            self.branch = output


@contextmanager
def measured(
    layers: Sequence[nn.Module], attention: Sequence[nn.Module], measure: Measure
) -> Iterator[None]:
    """Within the context, `measure` is called once for each layer of a forward that has rows.

    Args:
        layers: the decoder layers, in order.
        attention: the attention module of each.
        measure: its tensors are in the model's dtype; it must not write to them.

    The hooks that do it are registered for the context only.
    """

    def finish(i: int, residual: Residual, module: nn.Module, args: Any, output: Any) -> None:
        if residual.before is not None and residual.before.shape[1]:
            measure(i, residual.before[0], residual.after[0])

    with ExitStack() as hooks:
        for i, (layer, own) in enumerate(zip(layers, attention, strict=True)):
            residual = Residual(layer)
            hooks.enter_context(layer.register_forward_pre_hook(residual.enter, with_kwargs=True))
            hooks.enter_context(own.register_forward_hook(residual.attended))
            for child in layer.children():
                if child is not own:
                    hooks.enter_context(child.register_forward_hook(residual.follow))
            hooks.enter_context(layer.register_forward_hook(partial(finish, i, residual)))
        yield
