"""What a run says of a server: rates, times, and goodput under objectives."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tamis.load.client import Outcome
from tamis.load.run import Progress


@dataclass(frozen=True)
class Objectives:
    """What an answer must keep to be good: seconds to its first token, and between tokens."""

    ttft_s: float
    tpot_s: float

    def met(self, outcome: Outcome) -> bool:
        """Whether a request was answered, and in time. One token alone has no time between."""
        return (
            outcome.error is None
            and outcome.ttft_s is not None
            and outcome.ttft_s <= self.ttft_s
            and (outcome.tpot_s is None or outcome.tpot_s <= self.tpot_s)
        )


@dataclass(frozen=True)
class Percentiles:
    """Of times, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Percentiles | None:
        """None where there are none."""
        if not times:
            return None
        cuts = [times[0]] * 99
        if len(times) > 1:
            cuts = statistics.quantiles(times, n=100, method="inclusive")
        mean = statistics.fmean(times)
        return cls(mean, cuts[49], cuts[89], cuts[94], cuts[98], max(times))


@dataclass(frozen=True)
class Summary:
    """A run in numbers; rates are per second of `elapsed_s`.

    Attributes:
        good: requests that met the objectives; goodput is their rate.
        errors: how often each happened.
        ttft, tpot, longest_gap, total: of requests without error, as in `Outcome`.
    """

    elapsed_s: float
    sent: int
    answered: int
    failed: int
    unfinished: int
    good: int
    goodput: float
    requests_s: float
    output_tokens_s: float
    prompt_tokens_s: float
    prompt_tokens: float
    output_tokens: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    longest_gap: Percentiles | None
    total: Percentiles | None
    errors: dict[str, int]

    @classmethod
    def of(cls, progress: Progress, objectives: Objectives) -> Summary:
        """What there is so far."""
        answered = [outcome for outcome in progress.outcomes if outcome.error is None]
        errors = Counter(o.error for o in progress.outcomes if o.error is not None)
        elapsed = progress.elapsed_s
        good = sum(map(objectives.met, answered))

        def rate(n: float) -> float:
            return n / elapsed if elapsed else 0.0

        def times(name: str) -> Percentiles | None:
            values = (getattr(outcome, name) for outcome in answered)
            return Percentiles.of([value for value in values if value is not None])

        prompt_tokens = sum(outcome.prompt_tokens for outcome in answered)
        output_tokens = sum(outcome.output_tokens for outcome in answered)
        n = max(1, len(answered))
        return cls(
            elapsed_s=elapsed,
            sent=progress.sent,
            answered=len(answered),
            failed=len(progress.outcomes) - len(answered),
            unfinished=progress.unfinished,
            good=good,
            goodput=rate(good),
            requests_s=rate(len(answered)),
            output_tokens_s=rate(output_tokens),
            prompt_tokens_s=rate(prompt_tokens),
            prompt_tokens=prompt_tokens / n,
            output_tokens=output_tokens / n,
            ttft=times("ttft_s"),
            tpot=times("tpot_s"),
            longest_gap=times("longest_gap_s"),
            total=times("total_s"),
            errors=dict(errors.most_common()),
        )
