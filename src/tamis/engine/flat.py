"""A step's work as the model takes it: the tokens of all its sequences, one after another."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from tamis.engine.draft import depths
from tamis.engine.outputs import TokenLogprob
from tamis.engine.program import Program
from tamis.engine.sampler import Sampled, with_logprobs
from tamis.engine.scheduler import Work
from tamis.engine.sequence import Request, Sequence
from tamis.model import Model, RowRanges


@dataclass
class FlatBatch:
    """The tokens of a step and what is asked of them.

    Attributes:
        tokens, positions: ids and absolute positions, [tokens].
        rope_lengths: as `Model.forward` takes them, [tokens]; empty if the model needs none.
        sample_at: rows whose logits are sampled from: the last token of every sequence whose last
            token is in the step, and all tokens of a draft.
        sampled: the sequences they belong to, in order, with the logits' rows of each.
        score_at: indices of the tokens whose successor in the prompt gets a log-probability.
        scored: the requests they belong to, in order, with the positions of each.
        ranges: first and last layer of each token, where some do not run through all.
        hidden: what tokens that begin beyond layer 0 are there, sequence by sequence.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rope_lengths: list[int] = field(default_factory=list)
    sample_at: list[int] = field(default_factory=list)
    sampled: list[tuple[Sequence, range]] = field(default_factory=list)
    score_at: list[int] = field(default_factory=list)
    scored: list[tuple[Request, range]] = field(default_factory=list)
    ranges: list[tuple[int, int]] | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, work: Seq[Work], model: Model) -> FlatBatch:
        """Flatten the work of a step, in its order."""
        flat = cls()
        if any(sequence.program is not None for sequence, _ in work):
            flat.ranges = []
        for sequence, n in work:
            begin = len(flat.tokens)
            if sequence.program is not None:
                flat._add_pass(sequence, sequence.program, n)
            else:
                flat._add_tokens(sequence, n)
            if flat.ranges is not None:
                layers = sequence.layers or range(len(model.layers))
                flat.ranges += [(layers[0], layers[-1])] * n
            if model.dynamic_rope:
                least = len(sequence.request.prompt_ids)
                if model.switch_length is not None:
                    least = len(sequence.tokens)
                flat.rope_lengths += (max(at + 1, least) for at in flat.positions[begin:])
        return flat

    @property
    def rows(self) -> RowRanges | None:
        """The layers of each row, as `Model.forward` takes them."""
        if self.ranges is None:
            return None
        first, last = torch.tensor(self.ranges).T
        return RowRanges(first, last, torch.cat(self.hidden) if self.hidden else None)

    def _add_tokens(self, sequence: Sequence, n: int) -> None:
        """The next tokens of a sequence, or its last one and a draft of those after it."""
        begin, end = sequence.n_computed, sequence.n_computed + n
        shift = sequence.life.position_shift if sequence.life is not None else 0
        row = len(self.tokens)
        if sequence.draft is not None:
            self.tokens += [sequence.tokens[begin], *sequence.draft.tokens.tolist()]
            at = begin - shift
            self.positions += [at, *(at + depths(sequence.draft)).tolist()]
            self._sample(sequence, range(row, row + n))
            return
        self.tokens += sequence.tokens[begin:end]
        self.positions += range(begin - shift, end - shift)
        if end == len(sequence.tokens):
            self._sample(sequence, range(row + n - 1, row + n))
        if positions := sequence.request.to_score(begin, end):
            self.score_at += (row + position - begin for position in positions)
            self.scored.append((sequence.request, positions))

    def _add_pass(self, sequence: Sequence, program: Program, n: int) -> None:
        """The next tokens of a pass."""
        tokens = program.tokens(n)
        row = len(self.tokens)
        self.tokens += [sequence.tokens[token] for token in tokens.tolist()]
        self.positions += program.positions(n).tolist()
        hidden = program.hidden(n)
        if hidden is not None:
            self.hidden.append(hidden)
        if program.whole and int(tokens[-1]) == len(sequence.tokens) - 1:
            self._sample(sequence, range(row + n - 1, row + n))

    def _sample(self, sequence: Sequence, rows: range) -> None:
        begin = len(self.sample_at)
        self.sample_at += rows
        self.sampled.append((sequence, range(begin, begin + len(rows))))

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
