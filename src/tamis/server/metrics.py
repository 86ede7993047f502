"""What Prometheus reads: the engine's counters and pages, and how long requests took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tamis.cache.format import PageFormat
from tamis.engine.engine import Engine
from tamis.engine.outputs import RequestMetrics, RequestOutput
from tamis.server.admission import Admission
from tamis.server.contexts import Contexts

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server.

    Args:
        engine: read at every scrape, while it runs.
        admission: of the server's requests.
        contexts: that it keeps.
    """

    def __init__(self, engine: Engine, admission: Admission, contexts: Contexts) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine, admission, contexts))
        self._responses = Counter(
            "tamis_http_responses",
            "Responses by path and status; 499 stands for clients that went away.",
            ["path", "status"],
            registry=self._registry,
        )
        self._finished = Counter(
            "tamis_completions",
            "Completions that ended, by reason.",
            ["finish_reason"],
            registry=self._registry,
        )
        self._times = {
            name: Histogram(f"tamis_{name}_seconds", what, buckets=buckets, registry=self._registry)
            for name, what, buckets in (
                ("time_to_first_token", "From arrival to the first token.", _SECONDS),
                ("time_per_output_token", "Between tokens after the first.", _TOKEN_SECONDS),
                ("queue_time", "From arrival to the first work on a request.", _SECONDS),
                ("request_time", "From arrival to the end of a request.", _SECONDS),
            )
        }

    def responded(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def ended(self, outputs: Iterable[RequestOutput]) -> None:
        """Count requests that came to their end."""
        for output in outputs:
            for completion in output.completions:
                self._finished.labels(completion.finish_reason).inc()
            self._observe(output.metrics)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _observe(self, metrics: RequestMetrics) -> None:
        for name, seconds in (
            ("time_to_first_token", metrics.ttft_s),
            ("time_per_output_token", metrics.tpot_s),
            ("queue_time", metrics.queue_s),
            ("request_time", metrics.total_s),
        ):
            if seconds is not None:
                self._times[name].observe(seconds)


class EngineCollector(Collector):
    """The state of an engine at the time of a scrape."""

    def __init__(self, engine: Engine, admission: Admission, contexts: Contexts) -> None:
        self._engine = engine
        self._admission = admission
        self._contexts = contexts

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._prefixes()
        yield from self._pages()

    def _gauges(self) -> Iterator[Metric]:
        scheduler, cache = self._engine.scheduler, self._engine.cache
        for name, what, value in (
            ("requests_open", "Requests that were accepted and have not ended.", self.n_open),
            ("sequences_running", "Sequences that hold pages.", len(scheduler.running)),
            ("sequences_waiting", "Sequences that wait for pages.", len(scheduler.waiting)),
            ("sequences_swapped", "Sequences swapped to host memory.", len(scheduler.swapped)),
            ("swap_bytes", "Host memory of swapped sequences.", cache.swap_bytes_in_use),
            ("kv_bytes_peak", "The most bytes of pages at once.", cache.bytes_peak),
            ("contexts", "Contexts that requests may name.", len(self._contexts)),
            ("context_bytes", "Bytes of their pages, shared ones too.", self._contexts.bytes),
        ):
            yield GaugeMetricFamily(f"tamis_{name}", what, value=value)

    @property
    def n_open(self) -> int:
        return self._admission.n_open

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, what, value in (
            ("steps", "Steps of the engine.", stats.steps),
            ("step_seconds", "Time in steps.", stats.step_s),
            ("forward_seconds", "Time in the model's forward.", stats.forward_s),
            ("prefill_tokens", "Prompt tokens computed.", stats.prefill_tokens),
            ("decode_tokens", "Generated tokens computed.", stats.decode_tokens),
            ("preemptions", "Times that a sequence gave its pages up.", stats.preemptions),
            ("drafted_tokens", "Tokens that plans proposed.", stats.drafted),
            ("accepted_tokens", "Proposed tokens that were right.", stats.accepted),
        ):
            yield CounterMetricFamily(f"tamis_{name}", what, value=value)

    def _prefixes(self) -> Iterator[Metric]:
        prefixes = self._engine.prefixes
        for name, what, value in (
            ("lookups", "Sequences that began to be computed.", prefixes.lookups),
            ("hits", "Those of them that found pages of an earlier one.", prefixes.hits),
            ("lookup_tokens", "Tokens of all of them.", prefixes.looked_up_tokens),
            ("hit_tokens", "Tokens that were found.", prefixes.hit_tokens),
        ):
            yield CounterMetricFamily(f"tamis_prefix_{name}", what, value=value)
        kept = GaugeMetricFamily("tamis_prefix_bytes", "Bytes of pages kept for later requests.")
        kept.add_metric([], prefixes.tree.bytes)
        yield kept

    def _pages(self) -> Iterator[Metric]:
        labels = ["tier", "format"]
        pages = GaugeMetricFamily("tamis_kv_pages", "Pages in use.", labels=labels)
        in_use = GaugeMetricFamily("tamis_kv_bytes", "Bytes of pages in use.", labels=labels)
        capacity = GaugeMetricFamily("tamis_kv_capacity_bytes", "Bytes for pages.", labels=["tier"])
        cache = self._engine.cache
        for name, tier in (("device", cache.device_tier), ("host", cache.host_tier)):
            capacity.add_metric([name], tier.arena.capacity_bytes)
            for pool in tuple(tier.pools):  # the engine's thread may add one
                label = [name, describe(pool.format)]
                pages.add_metric(label, pool.bytes_in_use // pool.page_bytes)
                in_use.add_metric(label, pool.bytes_in_use)
        yield from (pages, in_use, capacity)


def describe(format: PageFormat) -> str:
    """A page format as a label: its fields, their types and widths."""
    fields = ",".join(
        f"{field.name}:{str(field.dtype).removeprefix('torch.')}x{field.width}"
        for field in format.fields
    )
    return f"{format.page_size}({fields})"
