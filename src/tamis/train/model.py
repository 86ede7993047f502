"""The reference model, and a forward of it that computes only what the training loss needs.

The model is a Llama with norms on queries and keys, which Transformers calls Qwen3, unmodified.
Without the norms, attention logits grow without bound under Muon, and attention saturates before
it has learned to look anything up. `logits_at` runs the model's parameters in bf16 under fp32
master weights, and lets only the positions that carry loss through the last layer's queries and
feed-forward block, the final norm and the head. That changes no logit at those positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tamis.train.recipe import Shape


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A model with random fp32 weights drawn from `seed`.

    The branches start small, so the residual stream is mostly the embedding at first; the norms of
    queries and keys start at 1.5, so attention is not uniform at first.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-6,
        attention_bias=False,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(1.5)
            layer.self_attn.k_norm.weight.fill_(1.5)
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
        _look_back(model)
    return model


def _look_back(model: Qwen3ForCausalLM) -> None:
    """Let two heads of the first layer begin by attending one and two tokens back.

    A look-up takes two steps: every token must know the tokens before it, and then the right one
    can be found by them. The second step cannot be learned before the first, which is what makes
    small models wait so long for it; so the first is given. All embeddings get a common component,
    which the two heads' queries and their key turn into rotations that agree at the wanted distance.
    """
    config = model.config
    dim, hidden = config.head_dim, config.hidden_size
    common = torch.zeros(hidden)
    common[0] = 1.0
    model.model.embed_tokens.weight.add_(0.1 * common)
    layer = model.model.layers[0].self_attn
    sharp = torch.arange(dim // 2) < dim // 8  # the fast rotations tell neighbours apart
    frequency = model.model.rotary_emb.inv_freq.float()
    for head in range(2):
        angle = -frequency * (head + 1)
        query = torch.cat([angle.cos() * sharp, angle.sin() * sharp])
        layer.q_proj.weight[head * dim : (head + 1) * dim] *= 0.1
        layer.q_proj.weight[head * dim : (head + 1) * dim, 0] = query
    layer.k_proj.weight[:dim] *= 0.1
    layer.k_proj.weight[:dim, 0] = torch.cat([sharp.float(), torch.zeros(dim // 2)])


def logits_at(
    model: Qwen3ForCausalLM,
    tokens: Tensor,
    positions: Tensor,
    where: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Logits after the selected tokens.

    tokens, positions [batch, length] int64 (positions rise along a row); where [batch, selected]
    int64, indices into a row. Returns [batch, selected, vocab] in fp32; products are in `dtype`,
    norms and rotations in fp32.
    """
    config = model.config
    eps = config.rms_norm_eps
    length = tokens.shape[1]
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    angles = positions[:, :, None].float() * model.model.rotary_emb.inv_freq.float()
    cos, sin = angles.cos(), angles.sin()
    earlier = torch.arange(length, device=tokens.device) <= where[:, None, :, None]
    x = F.embedding(tokens, model.model.embed_tokens.weight).to(dtype)
    for index, layer in enumerate(model.model.layers):
        last = index == config.num_hidden_layers - 1
        attention = layer.self_attn
        y = _norm(x, layer.input_layernorm.weight, eps)
        k = _heads(y, attention.k_proj, config.head_dim)
        k = _rotated(_norm(k, attention.k_norm.weight, eps), cos, sin)
        v = _heads(y, attention.v_proj, config.head_dim)
        if last:
            x, y, cos, sin = x[row, where], y[row, where], cos[row, where], sin[row, where]
        q = _heads(y, attention.q_proj, config.head_dim)
        q = _rotated(_norm(q, attention.q_norm.weight, eps), cos, sin)
        group = config.num_attention_heads // config.num_key_value_heads
        mixed = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, dim=1),
            v.repeat_interleave(group, dim=1),
            attn_mask=earlier if last else None,
            is_causal=not last,
        )
        x = x + _linear(mixed.transpose(1, 2).flatten(2), attention.o_proj)
        y = _norm(x, layer.post_attention_layernorm.weight, eps)
        gate, up = _linear(y, layer.mlp.gate_proj), _linear(y, layer.mlp.up_proj)
        x = x + _linear(F.silu(gate) * up, layer.mlp.down_proj)
    x = _norm(x, model.model.norm.weight, eps)
    return F.linear(x, model.model.embed_tokens.weight.to(dtype)).float()


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


def _heads(x: Tensor, projection: nn.Linear, head_dim: int) -> Tensor:
    """[batch, length, hidden] -> [batch, heads, length, head_dim]"""
    flat = _linear(x, projection)
    return flat.view(*flat.shape[:2], -1, head_dim).transpose(1, 2)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, length, dim]; cos, sin of the angles [batch, length, dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
