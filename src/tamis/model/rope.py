"""Rotary embeddings whose frequencies depend on the length of the sequence.

Two of Transformers' RoPE types choose their frequencies from the largest position of the forward:

- `dynamic`: beyond the original length, the base grows with the sequence's length;
- `longrope`: one set of factors up to the original length, another beyond it.

In a batch that mixes sequences, and in a prompt computed in chunks, that largest position is not
the sequence's own. So the caller says, per token, how long the sequence was when Transformers
would have rotated that token's key: the prompt's length for a token of the prompt, its position
plus one for a generated token. `lengths_honoured` has the rotary modules' own code compute each
group of equal frequencies by itself.

When a Phi-3 sequence grows past the original length *while generating*, `generate` throws its
cache away and computes all keys again with the long factors: `switch_length` says where, and the
caller must do the same, with every token's length set to the sequence's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel


def rotary_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """The rotary modules of `model`."""
    return tuple(module for module in model.modules() if _types(module))


def dynamic_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """The rotary modules of `model` whose frequencies depend on the sequence's length."""
    return tuple(module for module in model.modules() if any(map(_is_dynamic, _types(module))))


def switch_length(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """The length beyond which `generate` computes the keys of a growing sequence again, or None.

    Phi-3 and its relatives do so, in their own `prepare_inputs_for_generation`; every other model
    with `longrope` keeps the keys that were rotated by the short factors.
    """
    own = type(model).prepare_inputs_for_generation
    if own is GenerationMixin.prepare_inputs_for_generation:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    return int(original or rope["original_max_position_embeddings"])


@contextmanager
def lengths_honoured(modules: Sequence[nn.Module], lengths: Tensor) -> Iterator[None]:
    """Within the context, a forward rotates each token as in a sequence of its own length.

    Args:
        modules: what `dynamic_modules` found.
        lengths: int64 [tokens], the sequence length that chooses each token's frequencies.

    The hooks that do it are registered for the context only.
    """

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return _rotate_by_length(module, args, kwargs, output, lengths)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(replace, with_kwargs=True))
        yield


def _types(module: nn.Module) -> list[str]:
    """The RoPE types of a module: none if it is not rotary, several if they differ by layer."""
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        return [kind for kind in rope_type.values() if isinstance(kind, str)]
    return [rope_type] if isinstance(rope_type, str) else []


def _is_dynamic(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _rotate_by_length(
    module: Any, args: Any, kwargs: dict[str, Any], output: Any, lengths: Tensor
) -> Any:
    """What `module` returns, each token's row taken from a call with that token's length."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    layer_type = call.arguments.get("layer_type")
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if not _is_dynamic(rope_type):
        return output
    positions = call.arguments["position_ids"]  # [1, tokens]

    def rotate(at: Tensor) -> tuple[Tensor, ...]:
        call.arguments["position_ids"] = at
        return _parts(module.forward(*call.args, **call.kwargs))

    rows = tuple(torch.empty_like(part) for part in _parts(output))
    deciding = _deciding(lengths, rope_type, _original_length(module, rope_type, layer_type))
    # `dynamic` keeps the frequencies of the longest sequence it has seen until a short one comes:
    # so a sequence of one token first, and then the groups in ascending order of length.
    rotate(positions.new_zeros(1, 1))
    for length in torch.unique(deciding):
        chosen = (deciding == length).nonzero()[:, 0]
        # After the group's tokens, one more that has the last position of such a sequence.
        last = (length - 1).to(positions.dtype).view(1, 1)
        group = rotate(torch.cat([positions[:, chosen], last], dim=1))
        for row, part in zip(rows, group, strict=True):
            row[:, chosen] = part[:, :-1]
    return rows[0] if isinstance(output, Tensor) else rows


def _parts(output: Any) -> tuple[Tensor, ...]:
    """A rotary module's output, [1, tokens, ...] each: cosine and sine, or one complex tensor."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _original_length(module: Any, rope_type: str, layer_type: str | None) -> int:
    """The length up to which `module` uses its unscaled frequencies."""
    if rope_type == "longrope":
        parameters = module.config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        return int(parameters["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def _deciding(lengths: Tensor, rope_type: str, original: int) -> Tensor:
    """`lengths` with all that lead to the same frequencies made equal, so groups are few."""
    longest = original + 1 if rope_type == "longrope" else None
    return lengths.clamp(min=original, max=longest)
