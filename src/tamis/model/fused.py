"""Decoder layers by the compiled kernels.

At one row, a layer's matrices are read in some tens of microseconds, and the modules and torch
operations between them cost as much again: a few rows are two calls around the attention. Many rows
are multiplied by torch, and what lies between products goes once through memory instead of once per
operation. So run layers whose modules are those of Llama's (as in Mistral and Qwen 2 and 3) and
which compute what these say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import UnsupportedModelError
from tamis.model.interface import Attend
from tamis.model.linear import SERVED, max_rows, readable
from tamis.model.model import Model
from tamis.model.norm import RmsNorm, find_norm, rms_norm
from tamis.model.probe import LayerSpec
from tamis.model.quantized import matrix_of
from tamis.platform import NATIVE_DTYPES, native_for, native_module

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

NO_NORM = (0, 0.0, 0)

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""How far a layer's own results may lie from the kernels', relative to their norm: both round after
every operation, and differ in how they add."""


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """The forward of one decoder layer by the kernels.

    Up to `tamis.model.linear.max_rows` rows the kernels multiply too. Autograd, other dtypes and
    devices, calls without the `attend` of `Model.forward`, and layers whose modules somebody has
    hooked take the layer's own way.

    Attributes:
        layer: the module.
        index: which layer it is.
        spec: its attention.
        norms: of its input, after its attention, and of the heads of q and k, None for none.
    """

    layer: nn.Module
    index: int
    spec: LayerSpec
    norms: tuple[RmsNorm, RmsNorm, RmsNorm | None, RmsNorm | None]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer's forward: hidden states [1, rows, hidden_size]."""
        if not args and self._serves(hidden_states, kwargs):
            return self.run(hidden_states, kwargs["position_embeddings"], kwargs["attend"])
        out: Tensor = type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        return out

    def _serves(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the kernels compute what this call asks for."""
        places = kwargs.get("position_embeddings")
        if (
            torch.is_grad_enabled()
            or kwargs.get("attend") is None
            or kwargs.get("probe") is not None
            or type(places) is not tuple
            or native_module() is None
        ):
            return False
        matrix, rows = matrix_of(self.query_weight), x.shape[1]
        return (
            x.ndim == 3
            and x.shape[0] == 1
            and rows > 0
            and x.dtype in SERVED
            and x.is_cpu
            and matrix is not None
            and matrix.meets(x.dtype)
            and matrix.weight.is_cpu
            and x.is_contiguous()
            and all(
                at.shape[:2] == (1, rows) and at.dtype == x.dtype and at.is_contiguous()
                for at in places
            )
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self._parts())
        )

    @property
    def query_weight(self) -> Tensor:
        """Of the projection of queries, [q_heads k_dim, hidden_size]."""
        attention = self.layer._modules["self_attn"]
        assert attention is not None
        linear = attention._modules["q_proj"]
        assert linear is not None
        weight = linear._parameters["weight"]
        assert weight is not None
        return weight

    def _parts(self) -> list[nn.Module]:
        """The modules within the layer, whose own forwards the kernels stand in for."""
        children = self.layer._modules
        attention, mlp = children["self_attn"], children["mlp"]
        assert attention is not None
        assert mlp is not None
        every = (*children.values(), *attention._modules.values(), *mlp._modules.values())
        return [module for module in every if module is not None]

    def run(self, x: Tensor, places: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The layer by the kernels.

        Args:
            x: hidden states [1, rows, hidden_size], contiguous, in the dtype of the weights.
            places: cosines and sines [1, rows, rotated], contiguous, of the same dtype.
            attend: as in `Model.forward`.
        """
        run = self._few if x.shape[1] <= max_rows(x.dtype) else self._many
        return run(x, places, attend)

    def _few(self, x: Tensor, places: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Rows that the kernels multiply."""
        extension, spec = native_module(), self.spec
        assert extension is not None
        layer, attention, mlp = self._modules()
        rows, width = x.shape[1:]
        cos, sin = places
        threads, dtype = torch.get_num_threads(), NATIVE_DTYPES[x.dtype]
        first, second, q_norm, k_norm = self.norms
        q = x.new_empty(rows, spec.q_heads, spec.k_dim)
        k = x.new_empty(rows, spec.kv_heads, spec.k_dim)
        v = x.new_empty(rows, spec.kv_heads, spec.v_dim)
        extension.layer_inputs(
            "",
            threads,
            dtype,
            rows,
            width,
            x.data_ptr(),
            _norm(first, layer["input_layernorm"]),
            _matrix(attention["q_proj"]),
            _matrix(attention["k_proj"]),
            _matrix(attention["v_proj"]),
            spec.k_dim,
            cos.shape[-1],
            _norm(q_norm, attention.get("q_norm")),
            _norm(k_norm, attention.get("k_norm")),
            cos.data_ptr(),
            sin.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
        )
        attended = self._attended(q, k, v, attend)
        y = torch.empty_like(x)
        extension.layer_outputs(
            "",
            threads,
            dtype,
            rows,
            width,
            x.data_ptr(),
            attended.data_ptr(),
            spec.q_heads * spec.v_dim,
            _matrix(attention["o_proj"]),
            _norm(second, layer["post_attention_layernorm"]),
            _matrix(mlp["gate_proj"]),
            _matrix(mlp["up_proj"]),
            _matrix(mlp["down_proj"]),
            y.data_ptr(),
        )
        return y

    def _many(self, x: Tensor, places: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Rows that the layer's own linear modules multiply."""
        extension, spec = native_module(), self.spec
        assert extension is not None
        layer, attention, mlp = self._modules()
        rows, before = x.shape[1], x[0]
        threads, dtype = torch.get_num_threads(), NATIVE_DTYPES[x.dtype]
        first, second, q_norm, k_norm = self.norms

        def heads(name: str, n: int, norm: RmsNorm | None) -> Tensor:
            made: Tensor = attention[f"{name}_proj"](normed)
            cos, sin = places
            extension.place_heads(
                "",
                threads,
                dtype,
                rows,
                n,
                spec.k_dim,
                cos.shape[-1],
                made.data_ptr(),
                _norm(norm, attention.get(f"{name}_norm")),
                cos.data_ptr(),
                sin.data_ptr(),
            )
            return made.view(rows, n, spec.k_dim)

        normed = rms_norm(extension, first, before, layer["input_layernorm"].weight)
        q, k = heads("q", spec.q_heads, q_norm), heads("k", spec.kv_heads, k_norm)
        v = attention["v_proj"](normed).view(rows, spec.kv_heads, spec.v_dim)
        attended = self._attended(q, k, v, attend)
        between: Tensor = attention["o_proj"](attended.view(rows, -1)).add_(before)
        normed = rms_norm(extension, second, between, layer["post_attention_layernorm"].weight)
        gate, up = mlp["gate_proj"](normed), mlp["up_proj"](normed)
        extension.gate("", threads, dtype, gate.numel(), gate.data_ptr(), up.data_ptr())
        y: Tensor = mlp["down_proj"](gate).add_(between)
        return y[None]

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """What `attend` makes of queries, keys and values [rows, heads, dim], contiguous."""
        spec = self.spec
        return attend(
            self.index,
            q,
            k,
            v,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=None,
        ).contiguous()

    def _modules(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The modules of the layer, of its attention and of its MLP, by name."""
        layer: dict[str, Any] = self.layer._modules
        return layer, layer["self_attn"]._modules, layer["mlp"]._modules


def fuse_layers(model: Model) -> None:
    """Let the layers of a model in fp16 or bf16 on the CPU run few rows by the kernels.

    Only instances are changed, and only layers that have the modules of Llama's and nothing else,
    and whose own forward gives what the kernels give for random rows.
    """
    weight = next(model.hf.parameters())
    if model.dtype not in SERVED or native_for(None, weight) is None:
        return
    try:
        layers = model.decoder_layers
    except UnsupportedModelError:
        return
    found = [
        _recognised(layer, attention, index, spec)
        for index, (layer, attention, spec) in enumerate(
            zip(layers, model.attention_modules, model.layers, strict=True)
        )
    ]
    if not any(found):
        return
    for quick, kwargs in zip(found, model.layer_arguments(), strict=True):
        if quick is not None and _agrees(quick, kwargs):
            quick.layer.forward = quick


def _recognised(
    layer: nn.Module, attention: nn.Module, index: int, spec: LayerSpec
) -> FusedLayer | None:
    """The layer's forward by the kernels if its modules are those of Llama's; None if not."""
    if set(layer._modules) != LAYER or layer.self_attn is not attention or spec.sinks:
        return None
    mlp, inner = layer.mlp, set(attention._modules)
    if not isinstance(mlp, nn.Module) or set(mlp._modules) != MLP:
        return None
    if inner not in (ATTENTION, ATTENTION | HEAD_NORMS):
        return None
    if any(part._parameters or part._buffers for part in (layer, attention, mlp)):
        return None
    linears = [attention._modules[name] for name in sorted(ATTENTION)]
    linears += [mlp._modules[name] for name in sorted(MLP - {"act_fn"})]
    if not all(type(linear) is nn.Linear and readable(linear.weight) for linear in linears):
        return None
    names = [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
    norms = [find_norm(getattr(owner, name)) for owner, name in names]
    norms += [
        find_norm(getattr(attention, name)) if name in inner else None
        for name in sorted(HEAD_NORMS, reverse=True)
    ]
    missing = norms[:2] if inner == ATTENTION else norms
    if None in missing:
        return None
    return FusedLayer(layer, index, spec, tuple(norms))  # type: ignore[arg-type]


def _agrees(quick: FusedLayer, kwargs: dict[str, Any]) -> bool:
    """Whether a layer's own forward and the kernels give the same for random rows.

    Args:
        quick: the layer's forward by the kernels.
        kwargs: what the model calls the layer with beside hidden states.
    """
    places, layer = kwargs.get("position_embeddings"), quick.layer
    if type(places) is not tuple or kwargs.get("attend") is None:
        return False
    if not all(at.ndim == 3 and at.shape[0] == 1 for at in places):
        return False
    own, ours = _Witness(), _Witness()
    rows, weight = places[0].shape[1], quick.query_weight
    generator = torch.Generator().manual_seed(0)
    # Small rows, whose norms make them large: the residual must not hide what is added to it.
    x = (0.02 * torch.randn(1, rows, weight.shape[1], generator=generator)).to(weight.dtype)
    asked = {name: value for name, value in kwargs.items() if name not in ("attend", "probe")}
    with torch.no_grad():
        y = type(layer).forward(layer, x, **asked, attend=own)
        for run in (quick._few, quick._many):
            quick_y = run(x, places, ours)
            results = zip([*own.tensors, y], [*ours.tensors, quick_y], strict=True)
            if own.options != ours.options or not all(_close(a, b) for a, b in results):
                return False
    return True


class _Witness:
    """An `Attend` that keeps what it is given; every token sees only itself."""

    def __init__(self) -> None:
        self.tensors: Sequence[Tensor] = ()
        self.options: tuple[Any, ...] = ()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.tensors = (q, k, v)
        self.options = (layer, options)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    difference = float((a.float() - b.float()).norm())
    return difference <= TOLERANCE[a.dtype] * float(a.float().norm())


def _norm(norm: RmsNorm | None, module: Any) -> tuple[int, float, int]:
    """A norm as the kernels take it."""
    return NO_NORM if norm is None else norm.operand(module._parameters["weight"])


def _matrix(linear: Any) -> tuple[int, int, int, int]:
    """A linear layer as the kernels take it."""
    matrix, bias = matrix_of(linear._parameters["weight"]), linear._parameters["bias"]
    assert matrix is not None
    return (
        matrix.weight.data_ptr(),
        bias.data_ptr() if bias is not None else 0,
        linear.out_features,
        matrix.scales.data_ptr() if matrix.scales is not None else 0,
    )
