"""What a configuration says about whether its model can run on per-head KV pages."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tamis.errors import UnsupportedModelError

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""The layer types of Transformers whose whole state is the keys and values of each token."""


def check_supported(config: PreTrainedConfig, name: str) -> None:
    """Raise UnsupportedModelError if `config` alone shows that the model cannot run here."""
    reason = _why_not(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, which tamis cannot run: {reason}."
        )


def _why_not(config: PreTrainedConfig) -> str | None:
    """The reason against a model, or None; a model without one is still probed when loaded."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoder-only models have a single KV cache"
    text: Any = config.get_text_config(decoder=True)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if getattr(model_class, "_is_stateful", False) or "linear_attention" in others:
        return "it has recurrent (state-space or linear-attention) layers, which keep no KV"
    if others:
        return f"it has layers of type {', '.join(others)}, which are not plain attention"
    if getattr(text, "kv_lora_rank", None):
        return "it caches a latent shared by all heads (MLA), not keys and values per head"
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (
        getattr(text, "kv_sharing_modes", None) or ()
    ):
        return "some of its layers use the keys and values of others"
    bidirectional = getattr(text, "use_bidirectional_attention", None)
    if bidirectional is True or bidirectional == "all" or not getattr(text, "is_causal", True):
        return "its attention is bidirectional"
    if model_class is None and not hasattr(config, "auto_map"):
        return "Transformers has no causal language model of that type"
    if model_class is not None and not _uses_attention_interface(model_class):
        return "its code does not use Transformers' attention interface"
    return None


def _uses_attention_interface(model_class: Any) -> bool:
    """Whether Transformers lets the attention of `model_class` be chosen."""
    # Transformers has no public question for this; where it is absent the probe will tell.
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    return can_set is None or bool(can_set())
