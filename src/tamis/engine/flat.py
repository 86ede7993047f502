"""A step's work as the model takes it: the tokens of all its sequences, one after another."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from tamis.engine.outputs import TokenLogprob
from tamis.engine.sampler import Sampled, with_logprobs
from tamis.engine.scheduler import Work
from tamis.engine.sequence import Request
from tamis.model import Model


@dataclass
class FlatBatch:
    """The tokens of a step and what is asked of them.

    Attributes:
        tokens, positions: ids and absolute positions, [tokens].
        rope_lengths: as `Model.forward` takes them, [tokens]; empty if the model needs none.
        sample_at: index of the last token of every sequence whose last token is in the step.
        score_at: indices of the tokens whose successor in the prompt gets a log-probability.
        scored: the requests they belong to, in order, with the positions of each.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rope_lengths: list[int] = field(default_factory=list)
    sample_at: list[int] = field(default_factory=list)
    score_at: list[int] = field(default_factory=list)
    scored: list[tuple[Request, range]] = field(default_factory=list)

    @classmethod
    def of(cls, work: Seq[Work], model: Model) -> FlatBatch:
        """Flatten the work of a step, in its order."""
        flat = cls()
        for sequence, n in work:
            begin, end = sequence.n_computed, sequence.n_computed + n
            flat.tokens += sequence.tokens[begin:end]
            flat.positions += range(begin, end)
            if model.dynamic_rope:
                least = len(sequence.request.prompt_ids)
                if model.switch_length is not None:
                    least = len(sequence.tokens)
                flat.rope_lengths += (max(position + 1, least) for position in range(begin, end))
            if end == len(sequence.tokens):
                flat.sample_at.append(len(flat.tokens) - 1)
            if positions := sequence.request.to_score(begin, end):
                flat.score_at += (len(flat.tokens) - end + position for position in positions)
                flat.scored.append((sequence.request, positions))
        return flat

    def score(self, logits: torch.Tensor) -> None:
        """Give the scored prompts their log-probabilities.

        Args:
            logits: of the tokens `score_at`, fp32 [m, vocab].
        """
        begin = 0
        for request, positions in self.scored:
            targets = request.prompt_ids[positions.start + 1 : positions.stop + 1]
            top = [request.params.prompt_logprobs or 0] * len(targets)
            rows = with_logprobs(logits[begin : begin + len(targets)], targets, top)
            request.prompt_logprobs += [as_logprob(row) for row in rows]
            begin += len(targets)


def as_logprob(sampled: Sampled) -> TokenLogprob:
    """A token that was sampled, or given, with the log-probabilities that were asked for."""
    assert sampled.logprob is not None
    return TokenLogprob(sampled.token_id, sampled.logprob, tuple(sampled.top_logprobs or ()))
