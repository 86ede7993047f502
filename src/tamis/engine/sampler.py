"""From logits to tokens: one call per step, every row under its own request's parameters.

The order of operations is that of 🤗 `generate`: logit bias, penalties, then either argmax or
temperature, top-k, top-p, min-p, and one draw by inverse CDF. (min-p compares ratios to the most
probable token, which truncation always keeps, so only its place after top-p matters: top-p counts
the mass that min-p would drop.) Tokens that tie with the last one kept stay, so the outcome does
not depend on how a sort orders equal logits.

Every reduction runs along a row and every elementwise operation here is correctly rounded, so a
row's result is bit-identical whatever rows are beside it.
"""

from __future__ import annotations

import copy
import math
import random
import secrets
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tamis.sampling import SamplingParams

SHORT_HEAD = 1024
"""Top-p first looks for its cut-off among this many most probable tokens: sorting a vocabulary of
128k costs ten times as much as finding its head, which nearly always suffices."""


class Sampled(NamedTuple):
    """What one row of logits gave.

    Attributes:
        token_id: the chosen token; -1 where not `finite`.
        logprob: log-probability of the chosen token, where `params.logprobs` is not None.
        top_logprobs: the `params.logprobs` most probable (token id, log-probability), descending.
        finite: False where the row's largest logit is NaN or infinite, so that no token could be
            chosen; the other rows are not affected.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finite: bool = True


class SamplerState:
    """What sampling remembers of one sequence: its random stream and the tokens seen so far.

    The stream depends on the seed and the branch alone, and advances by one number per drawn
    token, so preemption and batching do not change it.

    Args:
        params: the request's parameters.
        prompt_ids: token ids of the prompt, each less than the vocabulary's size.
        eos_token_ids: the model's end-of-sequence ids.
        max_new: tokens that the output has at the most; its guide must know.

    Attributes:
        params: as given.
        stop_ids: the ids that end this sequence: `params.stop_token_ids`, and `eos_token_ids`
            unless `params.ignore_eos`.
        n_tokens: output tokens observed so far.
        guided: the output under `params.guide`, where there is one.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        eos_token_ids: Iterable[int] = (),
        max_new: int = 0,
    ) -> None:
        self.params = params
        self.guided = None if params.guide is None else params.guide.start()
        self._max_new = max_new
        ending = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset(params.stop_token_ids).union(ending)
        self.n_tokens = 0
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._stream = _stream(self._seed, 0)
        self._penalizes = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        # Slot s of the arrays is the s-th distinct token seen and its occurrences in the output;
        # the prompt's tokens matter, with 0 occurrences, to the repetition penalty only.
        self._seen = array("q", set(prompt_ids) if params.repetition_penalty != 1 else ())
        self._counts = array("q", bytes(8 * len(self._seen)))
        self._slots = {token_id: slot for slot, token_id in enumerate(self._seen)}

    def fork(self, branch: int) -> SamplerState:
        """A state that has seen the same tokens and draws from the stream of `branch`.

        Branch 0 has the stream of an unforked request; fork before the first draw.
        """
        twin = copy.copy(self)
        twin._stream = _stream(self._seed, branch)
        twin._seen, twin._counts = self._seen[:], self._counts[:]
        twin._slots = dict(self._slots)
        twin.guided = None if self.guided is None else self.guided.fork()
        return twin

    def observe(self, token_id: int) -> None:
        """Take note of a token that was added to the output."""
        self.n_tokens += 1
        if self.guided is not None:
            self.guided.observe(token_id)
        if not self._penalizes:
            return
        slot = self._slots.setdefault(token_id, len(self._seen))
        if slot == len(self._seen):
            self._seen.append(token_id)
            self._counts.append(0)
        self._counts[slot] += 1

    def uniform(self) -> float:
        """The next number of the sequence's stream, in [0, 1)."""
        return self._stream.random()

    @property
    def complete(self) -> bool:
        """Whether the output is all that its guide allows."""
        return self.guided is not None and self.guided.finished

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self._max_new - self.n_tokens

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits need changing before a choice."""
        changes = self._penalizes or self.params.logit_bias or self.blocked_ids
        return bool(changes) or self.guided is not None

    @property
    def blocked_ids(self) -> frozenset[int]:
        """The ids that cannot be chosen now: those that would end the output too early."""
        return self.stop_ids if self.n_tokens < self.params.min_tokens else frozenset()

    def vet(self, token_id: int) -> int:
        """The chosen token, or the one that must be taken in its place."""
        if self.params.forced:
            return self.params.forced[self.n_tokens]
        return token_id if self.guided is None else self.guided.vet(token_id, self.remaining)

    def adjust(self, row: torch.Tensor) -> None:
        """Apply bias, penalties, blocked ids and guide to this sequence's logits, in place.

        Args:
            row: logits, fp32 [vocab].
        """
        params, device = self.params, row.device
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
        if self._seen:
            ids = torch.from_numpy(np.array(self._seen)).to(device)
            counts = torch.from_numpy(np.array(self._counts)).to(device)
            seen = row[ids]
            penalty = params.repetition_penalty
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
            seen -= params.frequency_penalty * counts
            seen -= params.presence_penalty * (counts > 0)
            row[ids] = seen
        # A configuration may name end-of-sequence ids that its model does not have.
        blocked = [token_id for token_id in self.blocked_ids if token_id < len(row)]
        if blocked:
            row[torch.tensor(blocked, device=device)] = -math.inf
        if self.guided is not None:
            allowed = torch.from_numpy(self.guided.allowed(self.remaining)).to(device)
            row.masked_fill_(~allowed, -math.inf)


def _stream(seed: int, branch: int) -> random.Random:
    # A string seed is hashed with SHA-512: near seeds and branches give unrelated streams.
    return random.Random(f"{seed}/{branch}")


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """Choose the next token of every sequence.

    Changes neither `logits` nor what the states have observed; each sequence that draws advances
    its random stream by one number.

    Args:
        logits: fp32 [m, vocab], the model's own.
        states: the m sequences' states.

    Returns:
        m results in order. A row that holds NaN or +infinity, or nothing but -infinity, is marked
        not `finite` and gets no token.
    """
    adjusted = _adjust(logits, states)
    best, arg_best = adjusted.max(dim=-1)
    token_ids: list[int] = arg_best.tolist()
    finite = [math.isfinite(value) for value in best.tolist()]

    drawing = [i for i, s in enumerate(states) if finite[i] and not s.params.greedy]
    if drawing:
        chosen = [states[i] for i in drawing]
        probs = probabilities(_rows(adjusted, drawing), [s.params for s in chosen])
        for i, token_id in zip(drawing, _draw(probs, chosen), strict=True):
            token_ids[i] = token_id
    for i, state in enumerate(states):
        if finite[i]:
            token_ids[i] = state.vet(token_ids[i])

    results = [
        Sampled(token_id) if ok else Sampled(-1, finite=False)
        for token_id, ok in zip(token_ids, finite, strict=True)
    ]
    reporting = [i for i, s in enumerate(states) if finite[i] and s.params.logprobs is not None]
    if reporting:
        counts = [states[i].params.logprobs or 0 for i in reporting]
        ids = [token_ids[i] for i in reporting]
        reported = with_logprobs(_rows(logits, reporting), ids, counts)
        for i, result in zip(reporting, reported, strict=True):
            results[i] = result
    return results


def probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distributions that tokens are drawn from: temperature, top-k, top-p and min-p.

    Args:
        logits: fp32 [m, vocab], after bias and penalties, with a finite largest one in each row.
        params: the m rows' parameters, none of them greedy.

    Returns:
        fp32 [m, vocab]; each row sums to 1.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    # The largest logit becomes 0 first: dividing by a small temperature then cannot overflow.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled /= column([p.temperature for p in params])
    vocab = logits.shape[-1]
    floor = column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])
    truncated = [
        i for i, p in enumerate(params) if p.top_p < 1 or (p.top_k is not None and p.top_k < vocab)
    ]
    if truncated:
        rows = _rows(scaled, truncated)
        top_k = [min(params[i].top_k or vocab, vocab) for i in truncated]
        top_p = [params[i].top_p for i in truncated]
        kept = torch.maximum(floor[truncated], _truncation_floor(rows, top_k, top_p))
        floor[truncated] = kept
    return scaled.masked_fill(scaled < floor, -math.inf).softmax(dim=-1)


def _truncation_floor(scaled: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """The smallest value of each row of `scaled` [m, vocab] that top-k and top-p keep: [m, 1]."""
    vocab = scaled.shape[-1]
    width = min(vocab, max(k if k < vocab else SHORT_HEAD for k in top_k))
    floor, found = _floor_in_head(scaled, width, top_k, top_p)
    rest = [i for i, ok in enumerate(found) if not ok]
    if rest:
        floor[rest], _ = _floor_in_head(
            _rows(scaled, rest), vocab, [top_k[i] for i in rest], [top_p[i] for i in rest]
        )
    return floor


def _floor_in_head(
    scaled: torch.Tensor, width: int, top_k: list[int], top_p: list[float]
) -> tuple[torch.Tensor, list[bool]]:
    """`_truncation_floor` from the `width` largest values, and whether they suffice for a row."""
    device, vocab = scaled.device, scaled.shape[-1]
    k = torch.tensor(top_k, device=device).unsqueeze(1)
    # Without top-p every token counts, however cumulative sums round.
    p = torch.tensor([x if x < 1 else math.inf for x in top_p], dtype=torch.float64, device=device)
    head, ids = scaled.topk(width, dim=-1)
    floor = head.gather(1, k.clamp(max=width) - 1)
    floor = floor.masked_fill(k > width, -math.inf)
    probs = scaled.masked_fill(scaled < floor, -math.inf).softmax(dim=-1).gather(1, ids)
    # A token stays while the mass of the more probable ones is short of top_p.
    before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
    n_kept = (before < p.unsqueeze(1)).sum(dim=-1, keepdim=True)
    enough = (k <= width) | (n_kept < width) | (width == vocab)
    return head.gather(1, torch.minimum(n_kept, k) - 1), enough.flatten().tolist()


def _draw(probs: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """One token id per row of `probs` [m, vocab]: the first where the CDF exceeds a uniform."""
    # In fp64: the rounding of an fp32 sum over a large vocabulary outweighs a rare token.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.tensor([s.uniform() for s in states], dtype=torch.float64, device=probs.device)
    target = uniform.unsqueeze(1) * cdf[:, -1:]
    token_ids: list[int] = torch.searchsorted(cdf, target, right=True).flatten().tolist()
    return token_ids


def _adjust(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """`logits` with bias, penalties and blocked ids applied, copied only where there are any."""
    adjusting = [i for i, s in enumerate(states) if s.adjusts]
    if not adjusting:
        return logits
    adjusted = logits.clone()
    for i in adjusting:
        states[i].adjust(adjusted[i])
    return adjusted


def with_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[Sampled]:
    """Given tokens with their log-probabilities.

    Args:
        logits: fp32 [m, vocab], the model's own.
        token_ids: one token per row.
        counts: how many of the most probable tokens to report per row.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    # Row by count: how topk orders equal values depends on k, and must not on other rows.
    for count in set(counts) - {0}:
        rows = [i for i, c in enumerate(counts) if c == count]
        values, ids = _rows(logprobs, rows).topk(count, dim=-1)
        for i, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
            tops[i] = list(zip(row_ids, row_values, strict=True))
    return [
        Sampled(token_id, logprob, top)
        for token_id, logprob, top in zip(token_ids, chosen.flatten().tolist(), tops, strict=True)
    ]


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if len(rows) == len(x) else x[rows]
