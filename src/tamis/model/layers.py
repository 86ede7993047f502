"""The decoder layers of a model: where hidden states come in and go out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from tamis.errors import UnsupportedModelError


def decoder_layers(model: nn.Module, attention: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The modules of `model` that own the given attention modules, one each, in the same order.

    Raises:
        UnsupportedModelError: the model does not keep its layers in one list.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attention):
            pairs = zip(module, attention, strict=True)
            if all(any(part is own for part in layer.modules()) for layer, own in pairs):
                return tuple(module)
    raise UnsupportedModelError("its decoder layers are not in one list of modules")


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [1, rows, hidden_size] among the arguments of a decoder layer's call."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@contextmanager
def tensors_checked(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, a forward raises UnsupportedModelError if one of `layers` returns
    anything but the hidden states."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UnsupportedModelError("its decoder layers return more than hidden states")

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(check))
        yield


@contextmanager
def arguments_noted(layers: Sequence[nn.Module]) -> Iterator[list[dict[str, Any]]]:
    """Within the context, what each of `layers` is called with by name is noted in the list."""
    noted: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.append(kwargs)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        yield noted


@contextmanager
def skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, each of `layers` returns its input and computes nothing."""

    def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    # No hook can skip a module. An attribute of the instance hides the method of its class.
    hidden = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = pass_on
    try:
        yield
    finally:
        for layer, own in zip(layers, hidden, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
