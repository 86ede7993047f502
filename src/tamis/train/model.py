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
        _begin_looking_up(model)
    return model


def _begin_looking_up(model: Qwen3ForCausalLM) -> None:
    """Let the model begin with one head that finds what followed an earlier equal token.

    A look-up takes two steps: every token learns which tokens stand before it, then the right one
    is found by them. Neither step pays without the other, so a small model waits long for both:
    with random weights alone, it was still guessing after 4 million tokens. Here both are roughly
    given, half a million tokens make them work, and training is free to change them.

    First layer: all embeddings get a common component, from which two heads' queries and their key
    make rotations that agree one and two tokens back; each head writes what it finds into
    directions of its own. Second layer: the first head's query reads the token one back, its key
    the token two back. After "amber-falcon =" it attends to the token that followed "falcon =".
    """
    config = model.config
    dim, hidden = config.head_dim, config.hidden_size
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    model.model.embed_tokens.weight[:, 0] += 0.1
    sharp = torch.arange(dim // 2) < dim // 8  # the fast rotations tell neighbours apart
    frequency = model.model.rotary_emb.inv_freq.float()
    for head in range(2):
        rows = slice(head * dim, (head + 1) * dim)
        angle = -frequency * (head + 1)
        first.q_proj.weight[rows] *= 0.1
        first.q_proj.weight[rows, 0] = torch.cat([angle.cos() * sharp, angle.sin() * sharp])
    first.k_proj.weight[:dim] *= 0.1
    first.k_proj.weight[:dim, 0] = torch.cat([sharp.float(), torch.zeros(dim // 2)])
    written = torch.linalg.qr(torch.randn(hidden, 2 * dim)).Q  # orthonormal columns
    first.v_proj.weight[:dim] = torch.linalg.qr(torch.randn(hidden, dim)).Q.T
    first.v_proj.weight[:dim, 0] = 0.0
    first.o_proj.weight[:, : 2 * dim] = 0.04 * written
    mixing = torch.linalg.qr(torch.randn(dim, dim)).Q
    second.q_proj.weight[:dim] = mixing @ written[:, :dim].T
    second.k_proj.weight[:dim] = mixing @ written[:, dim:].T


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
