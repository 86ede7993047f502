"""DuoAttention: retrieval heads keep everything, streaming heads first and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tamis.methods.base import Heads, param
from tamis.methods.heads.fitted import choosable, load_scores, top_heads
from tamis.methods.views import ModelShape


@dataclass(frozen=True)
class DuoAttention(Heads):
    """Heads whose learned gate is low keep `sinks` first and `recent` recent tokens only.

    Training (`tamis train duoattention`) mixes, in every KV head, full and streaming attention as
    alpha full + (1 - alpha) streaming, and learns the gates alpha on documents with facts to recall
    (identification of retrieval heads). Here the heads are divided by them: the share `sparsity` of
    lowest gates is streaming, in the prompt and after it. The paper's defaults for models with GQA:
    sparsity 0.5, 64 sink and 256 recent tokens (for MHA it takes 0.75).

    Departures. The paper puts a threshold at the quantile `sparsity` of the gates; here heads are
    ranked, so that equal gates do not change how many are streaming (the earlier layer's head is
    kept full). Layers with a sliding window stay as the model has them.
    """

    paper = (
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads "
        "(arXiv:2410.10819)"
    )
    during_prefill = True

    sparsity: float = param(0.5, "share of the heads that are streaming", minimum=0, maximum=1)
    sinks: int = param(64, "first tokens that streaming heads keep", minimum=0)
    recent: int = param(256, "recent tokens that streaming heads keep", minimum=1)
    path: str = param("", "file of the gates; empty: where `tamis train duoattention` writes it")

    def streaming(self, shape: ModelShape) -> list[Tensor]:
        (gates,) = load_scores(self, self.path, shape, ("gates",))
        among = choosable(shape)
        heads = int(among.sum())
        full = top_heads(gates, among, heads - round(self.sparsity * heads))
        streaming = among & ~full
        return [streaming[i, : layer.kv_heads] for i, layer in enumerate(shape.layers)]

    def span(self, prompt_tokens: int) -> tuple[int, int]:
        return self.sinks, self.recent
