"""A loaded model and its flattened forward."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tamis.errors import UnsupportedModelError
from tamis.model.interface import Attend, NotHandedDownError, PassThroughCache, handed_down
from tamis.model.probe import PROBE_TOKENS, LayerSpec, Probe, check_layers
from tamis.model.rope import dynamic_modules, lengths_honoured, switch_length

UNLIMITED = 2**31 - 1
"""The context of a model that states no limit: positions are int32."""

EXTENDING = frozenset({"linear", "dynamic", "yarn"})
"""RoPE types whose factor multiplies the trained length; others state the extended length."""


class Model:
    """A 🤗 Transformers decoder, unmodified, whose attention is the caller's.

    Attributes:
        hf: the Transformers module, loaded with the attention of `tamis.model.interface`.
        config: its (text) configuration.
        tokenizer: its tokenizer, or None if the directory has none.
        name: the directory's or the hub repository's name.
        layers: what each layer hands over, in order.
        dynamic_rope: whether `forward` needs `rope_lengths`.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
    ) -> None:
        """Wrap `hf` and probe it.

        Raises:
            UnsupportedModelError: the model cannot run with its attention handed over.
        """
        self.hf = hf.eval()
        self.config: PreTrainedConfig = hf.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.name = name
        self._picks_logits = "logits_to_keep" in signature(hf.forward).parameters
        self._dynamic_modules = dynamic_modules(hf)
        self._unreached: tuple[nn.Module, ...] = ()  # attention without the forward's arguments
        self.layers: tuple[LayerSpec, ...] = self._probe()

    @property
    def dynamic_rope(self) -> bool:
        """Whether RoPE frequencies depend on the sequence's length (see `tamis.model.rope`)."""
        return bool(self._dynamic_modules)

    @cached_property
    def switch_length(self) -> int | None:
        """The length beyond which all keys of a growing sequence must be computed again, once;
        None for nearly every model (see `tamis.model.rope`)."""
        return switch_length(self.hf, self.config)

    @property
    def architecture(self) -> str:
        """The Transformers class, such as LlamaForCausalLM."""
        return type(self.hf).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of q, k and v."""
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie and tokens are expected."""
        device: torch.device = self.hf.device
        return device

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1; also the number of logits."""
        return int(self.config.vocab_size)

    @cached_property
    def max_length(self) -> int:
        """The longest sequence the model is made for, RoPE scaling included."""
        trained = getattr(self.config, "max_position_embeddings", None)
        if trained is None:
            return UNLIMITED
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") not in EXTENDING:
            return int(trained)
        original = rope.get("original_max_position_embeddings") or trained
        return max(int(trained), int(original * rope["factor"]))

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a sequence: the generation config's, else the model's."""
        generation = self.hf.generation_config
        ids = generation.eos_token_id if generation is not None else None
        if ids is None:
            ids = getattr(self.config, "eos_token_id", None)
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    @cached_property
    def n_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.hf.parameters())

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, shared ones counted once."""
        return sum(parameter.nbytes for parameter in self.hf.parameters())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers, in the model's dtype."""
        elements = sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers)
        return elements * self.dtype.itemsize

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend,
        rope_lengths: Tensor | None = None,
    ) -> Tensor:
        """Run the model on the tokens of any number of sequences, one after another.

        Args:
            input_ids: int64 [tokens].
            positions: int64 [tokens], each token's position in its own sequence.
            logits_at: int64 [m], the rows whose logits are wanted; m may be 0.
            attend: called once per layer, in order; it alone knows which token is whose.
            rope_lengths: int64 [tokens], required if `dynamic_rope` and ignored otherwise: the
                length of each token's sequence when its key is rotated, that is the prompt's
                length for a token of the prompt and position + 1 for a generated one.

        Returns:
            Logits, fp32 [m, vocab_size], the model's own scaling and soft-cap included.

        Raises:
            ValueError: shapes disagree, or `rope_lengths` is missing.
        """
        if input_ids.ndim != 1 or positions.shape != input_ids.shape or logits_at.ndim != 1:
            raise ValueError(
                "input_ids and positions must be [tokens] and logits_at [m], not "
                f"{list(input_ids.shape)}, {list(positions.shape)}, {list(logits_at.shape)}"
            )
        if self.dynamic_rope and (rope_lengths is None or rope_lengths.shape != input_ids.shape):
            raise ValueError("rope_lengths must be [tokens] for a model with dynamic RoPE")
        return self._run(input_ids, positions, logits_at, rope_lengths, {"attend": attend})

    def _run(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        logits_at: Tensor,
        rope_lengths: Tensor | None,
        down: dict[str, Any],
    ) -> Tensor:
        """`forward`, with the keyword arguments that go down to the attention function.

        Without `positions` the model chooses its own, as for one sequence from its beginning.
        """
        options: dict[str, Any] = {"logits_to_keep": logits_at} if self._picks_logits else {}
        if positions is not None:
            options["position_ids"] = positions.unsqueeze(0)
        with ExitStack() as contexts:
            if self._dynamic_modules and rope_lengths is not None:
                contexts.enter_context(lengths_honoured(self._dynamic_modules, rope_lengths))
            if self._unreached:
                contexts.enter_context(handed_down(self._unreached, down))
            else:
                options |= down
            logits: Tensor = self.hf(
                input_ids=input_ids.unsqueeze(0),
                past_key_values=PassThroughCache(),
                use_cache=False,
                **options,
            ).logits[0]
        return (logits if self._picks_logits else logits[logits_at]).float()

    @torch.no_grad()
    def _probe(self) -> tuple[LayerSpec, ...]:
        """Run a few tokens and record what every layer hands over."""
        try:
            try:
                probe = self._run_probe(own_positions=False)
            except NotHandedDownError as error:
                kind = type(error.module)
                self._unreached = tuple(m for m in self.hf.modules() if type(m) is kind)
                probe = self._run_probe(own_positions=False)
            check_layers(probe, self.config.num_hidden_layers)
            if not probe.rotates_like(self._run_probe(own_positions=True)):
                raise UnsupportedModelError("it does not count positions from 0")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._subject} cannot run here: {error}.") from error
        except Exception as error:  # a model that was never meant for this can fail anyhow
            raise UnsupportedModelError(
                f"{self._subject} cannot run with its attention handed over: "
                f"{type(error).__name__}: {error}."
            ) from error
        return tuple(probe.specs)

    def _run_probe(self, own_positions: bool) -> Probe:
        probe = Probe()
        at = torch.arange(PROBE_TOKENS, device=self.device)
        positions = None if own_positions else at
        lengths = torch.full_like(at, PROBE_TOKENS)
        down = {"attend": probe, "probing": True}
        ids = self.vocab_size // 2 + at  # ordinary tokens, padding is usually first or last
        self._run(ids, positions, at[:1], lengths, down)
        return probe

    @property
    def _subject(self) -> str:
        return f"{self.architecture} ({self.name})"
