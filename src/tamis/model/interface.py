"""Where a 🤗 Transformers model hands its attention over to the caller of `Model.forward`.

Transformers lets a library register an attention function and a mask function under a name; a
model loaded with that name calls them instead of its own. Ours build no mask and keep no keys or
values: `hand_over` passes each layer's `q`, `k`, `v` to the `Attend` that came down with the
forward's keyword arguments, so nothing is shared between two forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from tamis.errors import UnsupportedModelError
from tamis.model.probe import Probe

NAME = "tamis"
"""The name under which the attention and mask functions are registered."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Transformers' form of a mask: (batch, head, query position, key position) -> visible or not."""

# Arguments that some models send along and that say nothing about the attention itself.
HARMLESS = frozenset(
    {"dropout", "position_ids", "position_embeddings", "cache_position", "logits_to_keep"}
)


class Attend(Protocol):
    """Attention of one layer over the flattened tokens of a forward, given by its caller.

    Args:
        layer: index of the layer, counted from 0; a forward calls every layer once, in order.
        q: queries [tokens, q_heads, k_dim], already rotated.
        k: keys [tokens, kv_heads, k_dim], already rotated.
        v: values [tokens, kv_heads, v_dim].
        scale: factor of `q · k`.
        window: a query at position p sees positions p - window + 1 .. p; None sees 0 .. p.
        softcap: c if the scores s become c · tanh(s / c), before any mask.
        sinks: one extra logit per query head [q_heads], which takes part in the softmax and
            contributes nothing to the output; or None.

    `q`, `k`, `v` may be strided views, in the model's dtype.

    Returns:
        [tokens, q_heads, v_dim] in the dtype of `q`.
    """

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
    ) -> Tensor: ...


@dataclass(frozen=True)
class Mask:
    """What travels through the model in place of a mask tensor: the rule, not its evaluation.

    Attributes:
        visible: Transformers' mask function.
        window: the sliding window that Transformers says the rule has, or None.
    """

    visible: MaskFunction
    window: int | None

    def check(self) -> None:
        """Raise UnsupportedModelError unless the rule is causal, within `window` if there is one.

        The rule is evaluated at the first positions, where overlays lie, and around every multiple
        of the window up to the third, where a chunked rule differs from a sliding one.
        """
        step = self.window or 8
        edges = {max(0, multiple * step + offset) for multiple in range(4) for offset in (-1, 0, 1)}
        at = torch.tensor(sorted(edges | set(range(8))))
        q_at, k_at, zero = at[:, None], at[None, :], torch.zeros(1, 1, dtype=torch.long)
        expected = k_at <= q_at
        if self.window is not None:
            expected &= k_at > q_at - self.window
        try:
            plain = torch.equal(self.visible(zero, zero, q_at, k_at).expand_as(expected), expected)
        except IndexError:  # the rule looks the tokens up: it is not one of positions alone
            plain = False
        if not plain:
            raise UnsupportedModelError(
                "it masks attention by another rule than causal or sliding window "
                "(chunked, bidirectional, or with an overlay)"
            )


class PassThroughCache(Cache):  # type: ignore[misc]
    """A cache that is always empty: keys and values go through it and stay with the caller.

    It is there because a model that is given one does not look for packed sequences in the
    positions. A model that would keep any other state in it is stopped.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone; the past is the caller's."""
        return key_states, value_states

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError("it keeps a state beside keys and values")

    update_conv_state = update_recurrent_state = update_indexer = _refuse


class NotHandedDownError(Exception):
    """The forward's keyword arguments did not reach the attention module `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(f"{type(module).__name__} is not given the forward's keyword arguments")
        self.module = module


@contextmanager
def handed_down(modules: Sequence[nn.Module], arguments: dict[str, Any]) -> Iterator[None]:
    """Within the context, each of `modules` is called with `arguments` beside its own.

    For the models whose layers drop the forward's keyword arguments. The hooks that do it are
    registered for the context only.
    """

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | arguments

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(add, with_kwargs=True))
        yield


def hand_over(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    probe: Probe | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: one call of `attend` for the layer `module`.

    Transformers' layouts are query [1, q_heads, tokens, k_dim], key and value
    [1, kv_heads, tokens, dim], and [1, tokens, q_heads, v_dim] for the result. The mask, where
    there is one, decides the window: that is what Transformers' own exact attention obeys.
    With a `probe`, everything the layer asks for is checked to be something `attend` is told, and
    the probe is told the module.
    """
    if attend is None:
        raise NotHandedDownError(module)
    if probe is not None:
        probe.modules.append(module)
        _check_request(module, attention_mask, is_causal, others)
    window = attention_mask.window if isinstance(attention_mask, Mask) else sliding_window
    out = attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def _check_request(
    module: nn.Module,
    attention_mask: Mask | Tensor | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    """Raise UnsupportedModelError if a layer asks for attention that `Attend` cannot express."""
    if isinstance(attention_mask, Tensor):
        raise UnsupportedModelError("it builds its own attention mask")
    if isinstance(attention_mask, Mask):
        attention_mask.check()
    elif not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError("its attention is bidirectional")
    # Flags and names steer how a result is returned; anything else may change the result.
    strange = [
        name
        for name, value in others.items()
        if name not in HARMLESS and value is not None and not isinstance(value, bool | str)
    ]
    if strange:
        raise UnsupportedModelError(f"its attention takes {', '.join(strange)}")


def _rule(*, mask_function: MaskFunction, local_size: int | None = None, **kwargs: Any) -> Mask:
    """The registered mask function: hands the rule on instead of evaluating it."""
    return Mask(mask_function, local_size)


def register() -> None:
    """Make the attention and mask functions known to Transformers; calling it again is harmless."""
    AttentionInterface.register(NAME, hand_over)
    AttentionMaskInterface.register(NAME, _rule)
