"""The requests that ended lately: what their plans saved, and how long they took."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from tamis.engine.outputs import RequestOutput

KEPT = 256


@dataclass(frozen=True)
class Ended:
    """A request that ended. Times in seconds, sizes in bytes; see `RequestMetrics`."""

    id: str
    plan: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int
    preemptions: int


@dataclass(frozen=True)
class Quantiles:
    """Of some times, in seconds; None where there are none."""

    p50: float | None
    p95: float | None

    @classmethod
    def of(cls, times: Sequence[float]) -> Quantiles:
        if len(times) < 2:
            only = times[0] if times else None
            return cls(only, only)
        cuts = statistics.quantiles(times, n=20, method="inclusive")
        return cls(cuts[9], cuts[18])


@dataclass(frozen=True)
class Latencies:
    """Over the last requests: until their first token, between tokens, in the queue."""

    requests: int
    ttft: Quantiles
    tpot: Quantiles
    queue: Quantiles


class Recent:
    """The last requests, the newest first; so many are kept."""

    def __init__(self) -> None:
        self._ended: deque[Ended] = deque(maxlen=KEPT)

    def add(self, plan: str, outputs: Iterable[RequestOutput]) -> None:
        """Note that requests under a plan have ended."""
        fields = Ended.__dataclass_fields__.keys()
        for output in outputs:
            metrics = {k: v for k, v in asdict(output.metrics).items() if k in fields}
            self._ended.appendleft(Ended(output.request_id, plan, output.finish_reason, **metrics))

    def newest(self, n: int) -> list[Ended]:
        return [ended for ended, _ in zip(self._ended, range(n), strict=False)]

    def latencies(self) -> Latencies:
        def of(name: str) -> Quantiles:
            times = (getattr(ended, name) for ended in self._ended)
            return Quantiles.of([seconds for seconds in times if seconds is not None])

        return Latencies(len(self._ended), of("ttft_s"), of("tpot_s"), of("queue_s"))
