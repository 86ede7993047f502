"""A Llama that is computed token by token and layer by layer, for any choice of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class NaiveLlama:
    """One request, of which any tokens may run any layers.

    Attributes:
        n_layers: of the model.
        hidden: per layer (and behind the last) each token's input to it, [hidden_size].
        queries, keys, values: per layer each token's, [heads, dim].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.n_layers = len(model.model.layers)
        self.hidden: list[dict[int, Tensor]] = [{} for _ in range(self.n_layers + 1)]
        self.queries: list[dict[int, Tensor]] = [{} for _ in range(self.n_layers)]
        self.keys: list[dict[int, Tensor]] = [{} for _ in range(self.n_layers)]
        self.values: list[dict[int, Tensor]] = [{} for _ in range(self.n_layers)]

    def embed(self, token: int, token_id: int) -> None:
        """Give a token its input to layer 0."""
        self.hidden[0][token] = self._model.model.embed_tokens(torch.tensor(token_id))

    def run(self, layer: int, seen: list[int]) -> None:
        """Run those of the tokens that have not run this layer; each sees those before it."""
        module = self._model.model.layers[layer]
        running = [token for token in seen if token not in self.keys[layer]]
        for token in running:
            self._project(layer, token)
        for token in running:
            weights = self.weights(layer, token, seen)
            v = torch.stack([self.values[layer][one] for one in seen], 1)
            v = v.repeat_interleave(len(weights) // len(v), 0)
            mixed = torch.einsum("hn,hnd->hd", weights, v).flatten()
            states = self.hidden[layer][token] + module.self_attn.o_proj(mixed)
            out = states + module.mlp(module.post_attention_layernorm(states))
            self.hidden[layer + 1][token] = out

    def products(self, layer: int, query: int, seen: list[int]) -> Tensor:
        """A token's scaled products with the keys of others, -inf after it, [q_heads, seen]."""
        q = self.queries[layer][query]
        k = torch.stack([self.keys[layer][one] for one in seen], 1)
        k = k.repeat_interleave(len(q) // len(k), 0)
        products = torch.einsum("hd,hnd->hn", q, k) / q.shape[1] ** 0.5
        return products.masked_fill(torch.tensor(seen) > query, -torch.inf)

    def weights(self, layer: int, query: int, seen: list[int]) -> Tensor:
        """The softmax of these."""
        return self.products(layer, query, seen).softmax(-1)

    def next_id(self, token: int) -> int:
        """What a token that ran all layers is followed by."""
        model = self._model
        return int(model.lm_head(model.model.norm(self.hidden[-1][token])).argmax())

    def _project(self, layer: int, token: int) -> None:
        module = self._model.model.layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(self.hidden[layer][token])[None, None]
        cos, sin = self._model.model.rotary_emb(normed, torch.tensor([[token]]))
        q, k, v = (
            project(normed).view(1, -1, 1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        self.queries[layer][token] = q[0, :, 0]
        self.keys[layer][token], self.values[layer][token] = k[0, :, 0], v[0, :, 0]
