"""A loaded model and its flattened forward."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tamis.errors import UnsupportedModelError
from tamis.model.effect import Measure, measured
from tamis.model.interface import Attend, NotHandedDownError, PassThroughCache, handed_down
from tamis.model.layers import arguments_noted, decoder_layers, tensors_checked
from tamis.model.probe import PROBE_TOKENS, LayerSpec, Probe, check_layers
from tamis.model.quantized import stored_bytes
from tamis.model.rope import dynamic_modules, lengths_honoured, rotary_modules, switch_length
from tamis.model.rows import RowRanges, passing
from tamis.model.shift import REACH, Rotation, find_rotations, rotary_calls

UNLIMITED = 2**31 - 1
"""The context of a model that states no limit: positions are int32."""

EXTENDING = frozenset({"linear", "dynamic", "yarn"})
"""RoPE types whose factor multiplies the trained length; others state the extended length."""


class _Handed(Exception):  # noqa: N818 - the way out of a forward, not a failure
    """A layer's keys and values, before its attention runs."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = k, v


class Model:
    """A 🤗 Transformers decoder, unmodified, whose attention is the caller's.

    Attributes:
        hf: the Transformers module, loaded with the attention of `tamis.model.interface`.
        config: its (text) configuration.
        tokenizer: its tokenizer, or None if the directory has none.
        name: the directory's or the hub repository's name.
        directory: where its files lie; None for a model that was made in memory.
        weights: "int8" or "int4" where linear layers are quantized, None where all is exact.
        layers: what each layer hands over, in order.
        attention_modules: the module of each layer that hands it over.
        dynamic_rope: whether `forward` needs `rope_lengths`.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        directory: Path | None = None,
        weights: str | None = None,
    ) -> None:
        """Wrap `hf` and probe it.

        Raises:
            UnsupportedModelError: the model cannot run with its attention handed over.
        """
        self.hf = hf.eval().requires_grad_(False)
        self.config: PreTrainedConfig = hf.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.name = name
        self.directory = directory
        self.weights = weights
        self._picks_logits = "logits_to_keep" in signature(hf.forward).parameters
        self._dynamic_modules = dynamic_modules(hf)
        self._unreached: tuple[nn.Module, ...] = ()  # attention without the forward's arguments
        probe = self._probe()
        self.layers: tuple[LayerSpec, ...] = tuple(probe.specs)
        self.attention_modules = tuple(probe.modules)

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
        """Bytes in which the parameters are kept, shared ones counted once."""
        return sum(stored_bytes(parameter) for parameter in self.hf.parameters())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers, in the model's dtype."""
        elements = sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers)
        return elements * self.dtype.itemsize

    @cached_property
    def decoder_layers(self) -> tuple[nn.Module, ...]:
        """The module of each layer, from hidden states to hidden states.

        Raises:
            UnsupportedModelError: the model's layers are not in one list, or do more than that.
        """
        try:
            layers = decoder_layers(self.hf, self.attention_modules)
            with tensors_checked(layers):
                self._run_probe(torch.arange(PROBE_TOKENS, device=self.device))
            return layers
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{self._subject} cannot run layer by layer: {error}."
            ) from error

    def layer_arguments(self) -> list[dict[str, Any]]:
        """What each of `decoder_layers` is called with by name, for a few tokens far apart.

        Raises:
            UnsupportedModelError: as for `decoder_layers`.
        """
        last = min(self.max_length, REACH) - 1
        at = torch.arange(PROBE_TOKENS, device=self.device) * (last // PROBE_TOKENS)
        with arguments_noted(self.decoder_layers) as noted:
            self._run_probe(at)
        return noted

    @overload
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend,
        rope_lengths: Tensor | None = None,
        rows: None = None,
        measure: Measure | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend,
        rope_lengths: Tensor | None = None,
        *,
        rows: RowRanges,
        measure: Measure | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend,
        rope_lengths: Tensor | None = None,
        rows: RowRanges | None = None,
        measure: Measure | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the model on the tokens of any number of sequences, one after another.

        Args:
            input_ids: int64 [tokens].
            positions: int64 [tokens], each token's position in its own sequence.
            logits_at: int64 [m], the rows whose logits are wanted; m may be 0.
            attend: called once per layer, in order; it alone knows which token is whose.
            rope_lengths: int64 [tokens], required if `dynamic_rope` and ignored otherwise: the
                length of each token's sequence when its key is rotated, that is the prompt's
                length for a token of the prompt and position + 1 for a generated one.
            rows: the layers that each token's row runs through; None is all layers for all. With
                it, `attend` is given the rows of its layer only, in row order, and is not called
                for a layer without rows; `logits_at` counts all rows, and names rows that run
                the last layer.
            measure: called once per layer that has rows, with (layer, before, after), both
                [rows of the layer, hidden_size]: the hidden states at the layer's input, and
                with the attention's output added.

        Returns:
            Logits, fp32 [m, vocab_size], the model's own scaling and soft-cap included. With
            `rows`, a pair: the logits, and the hidden states [k, hidden_size] of the k rows that
            leave before the last layer, as the next layer would get them, in row order.

        Raises:
            ValueError: shapes disagree, `rope_lengths` is missing, or `rows` are impossible.
            UnsupportedModelError: `rows` or `measure` is given, and the model's layers cannot be
                run one by one (see `decoder_layers`).
        """
        self._check_inputs(input_ids, positions, logits_at, rope_lengths)
        with ExitStack() as hooks:
            passage = None
            if rows is not None:
                rows.check(len(input_ids), len(self.layers), self.config.hidden_size, logits_at)
                passage = hooks.enter_context(passing(self.decoder_layers, rows))
            if measure is not None:  # after `passing`, so that it sees the rows of the layer
                hooks.enter_context(measured(self.decoder_layers, self.attention_modules, measure))
            logits = self._run(input_ids, positions, logits_at, rope_lengths, {"attend": attend})
        return logits if passage is None else (logits, passage.left)

    @torch.no_grad()
    def keys_values(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer makes of hidden states, without running its attention.

        Args:
            layer: its index, at least 1.
            hidden: [tokens, hidden_size], at the layer's input.
            positions: int64 [tokens].

        Returns:
            [tokens, kv_heads, k_dim] and [tokens, kv_heads, v_dim].

        Raises:
            ValueError: shapes disagree.
            UnsupportedModelError: the model's layers cannot be run one by one, or its RoPE depends
                on the sequence's length.
        """
        if self.dynamic_rope:
            raise UnsupportedModelError(
                f"{self._subject} makes keys that depend on the sequence's length"
            )
        of_row = torch.full((len(positions),), layer)

        def stop(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            raise _Handed(k, v)

        try:
            rows = RowRanges(of_row, of_row, hidden)
            nowhere = positions[:0]
            self.forward(torch.zeros_like(positions), positions, nowhere, stop, rows=rows)
        except _Handed as handed:
            return handed.k, handed.v
        raise ValueError(f"layer {layer} has no attention to hand keys and values over")

    @torch.enable_grad()
    def train_forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend,
        rope_lengths: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """`forward` through which gradients flow to whatever `attend` learns.

        The model's own parameters are frozen. Everything between the layers is kept for the
        backward pass.

        Args:
            input_ids, positions, logits_at, attend, rope_lengths: as in `forward`.
            hidden: return the last hidden states instead, and compute no logits.

        Returns:
            Logits, fp32 [m, vocab_size]; or, with `hidden`, what the output projection would get,
            [tokens, hidden_size] in the model's dtype, of all tokens whatever `logits_at` says.

        Raises:
            ValueError: shapes disagree, or `rope_lengths` is missing.
        """
        self._check_inputs(input_ids, positions, logits_at, rope_lengths)
        rows = None if hidden else logits_at
        return self._run(input_ids, positions, rows, rope_lengths, {"attend": attend})

    @cached_property
    def can_shift(self) -> bool:
        """Whether `shift_keys` works for this model."""
        try:
            return bool(self._rotations)
        except UnsupportedModelError:
            return False

    @torch.no_grad()
    def shift_keys(self, layers: int | range, k: Tensor, delta: Tensor) -> Tensor:
        """Keys as they would be, had their tokens been at other positions.

        Args:
            layers: index of the layer that made the keys, or consecutive layers.
            k: keys [..., tokens, k_dim], rotated at some positions; of several layers [layers,
                tokens, k_dim].
            delta: int64 [tokens], how much further each token's position shall be; it may be
                negative. Of several layers [layers, tokens].

        Returns:
            Like `k`, computed in fp32; `k` itself if the layer does not rotate its keys.

        Raises:
            UnsupportedModelError: positions change keys by something else than one rotation, or
                by frequencies that depend on the sequence's length (`dynamic_rope`).
            ValueError: shapes disagree.
        """
        if isinstance(layers, range):
            rotations = self._rotations[layers.start : layers.stop]
            if all(rotation == rotations[0] for rotation in rotations):
                return self.shift_keys(layers[0], k.flatten(0, 1), delta.flatten()).view_as(k)
            each = zip(layers, k, delta, strict=True)
            return torch.stack([self.shift_keys(*of_layer) for of_layer in each])
        if k.ndim < 2 or delta.shape != k.shape[-2:-1]:
            raise ValueError(
                "k must be [..., tokens, k_dim] and delta [tokens], not "
                f"{list(k.shape)}, {list(delta.shape)}"
            )
        rotation = self._rotations[layers]
        return k if rotation is None else rotation.shift(k, delta)

    @cached_property
    def _rotations(self) -> tuple[Rotation | None, ...]:
        """How each layer rotates its keys, found by two probes at different positions."""
        try:
            if self.dynamic_rope:
                raise UnsupportedModelError("its RoPE depends on the sequence's length")
            last = min(self.max_length, REACH) - 1
            at = torch.arange(PROBE_TOKENS, device=self.device)
            to = last - last // PROBE_TOKENS * at.flip(0)
            with rotary_calls(rotary_modules(self.hf)) as calls:
                keys = [k for _, k in self._run_probe(at).rotated]
            moved = [k for _, k in self._run_probe(to).rotated]
            return find_rotations(keys, moved, to - at, calls)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{self._subject} cannot move cached keys to other positions: {error}."
            ) from error

    def _check_inputs(
        self, input_ids: Tensor, positions: Tensor, logits_at: Tensor, rope_lengths: Tensor | None
    ) -> None:
        """Raise ValueError if the shapes disagree or the lengths are missing."""
        if input_ids.ndim != 1 or positions.shape != input_ids.shape or logits_at.ndim != 1:
            raise ValueError(
                "input_ids and positions must be [tokens] and logits_at [m], not "
                f"{list(input_ids.shape)}, {list(positions.shape)}, {list(logits_at.shape)}"
            )
        if self.dynamic_rope and (rope_lengths is None or rope_lengths.shape != input_ids.shape):
            raise ValueError("rope_lengths must be [tokens] for a model with dynamic RoPE")

    def _run(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        logits_at: Tensor | None,
        rope_lengths: Tensor | None,
        down: dict[str, Any],
    ) -> Tensor:
        """`forward`, with the keyword arguments that go down to the attention function.

        Without `positions` the model chooses its own, as for one sequence from its beginning.
        Without `logits_at` the result is the last hidden states of all tokens.
        """
        options: dict[str, Any] = {}
        if logits_at is not None and self._picks_logits:
            options["logits_to_keep"] = logits_at
        if positions is not None:
            options["position_ids"] = positions.unsqueeze(0)
        network = self.hf.base_model if logits_at is None else self.hf
        with ExitStack() as contexts:
            if self._dynamic_modules and rope_lengths is not None:
                contexts.enter_context(lengths_honoured(self._dynamic_modules, rope_lengths))
            if self._unreached:
                contexts.enter_context(handed_down(self._unreached, down))
            else:
                options |= down
            output = network(
                input_ids=input_ids.unsqueeze(0),
                past_key_values=PassThroughCache(),
                use_cache=False,
                **options,
            )
        if logits_at is None:
            hidden: Tensor = output.last_hidden_state[0]
            return hidden
        logits: Tensor = output.logits[0]
        return (logits if self._picks_logits else logits[logits_at]).float()

    @torch.no_grad()
    def _probe(self) -> Probe:
        """Run a few tokens and record what every layer hands over."""
        first = torch.arange(PROBE_TOKENS, device=self.device)
        try:
            try:
                probe = self._run_probe(first)
            except NotHandedDownError as error:
                kind = type(error.module)
                self._unreached = tuple(m for m in self.hf.modules() if type(m) is kind)
                probe = self._run_probe(first)
            check_layers(probe, self.config.num_hidden_layers)
            if not probe.rotates_like(self._run_probe(None)):
                raise UnsupportedModelError("it does not count positions from 0")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._subject} cannot run here: {error}.") from error
        except Exception as error:  # a model that was never meant for this can fail anyhow
            raise UnsupportedModelError(
                f"{self._subject} cannot run with its attention handed over: "
                f"{type(error).__name__}: {error}."
            ) from error
        return probe

    @torch.no_grad()
    def _run_probe(self, positions: Tensor | None) -> Probe:
        """Run the probe's tokens at `positions` [PROBE_TOKENS], or where the model puts them."""
        probe = Probe()
        at = torch.arange(PROBE_TOKENS, device=self.device)
        lengths = torch.full_like(at, PROBE_TOKENS)
        down = {"attend": probe, "probe": probe}
        ids = self.vocab_size // 2 + at  # ordinary tokens, padding is usually first or last
        self._run(ids, positions, at[:1], lengths, down)
        return probe

    @property
    def _subject(self) -> str:
        return f"{self.architecture} ({self.name})"
