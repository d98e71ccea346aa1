"""The metrics of openapi/metrics.yaml on a registry of their own (HP-OBS-1, HP-OBS-6).

Counters and histograms move when an event is committed. Gauges are read when somebody scrapes, from the state itself,
so they cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_orch.contract import metrics as contract

# (gauge's name, label values, value)
Reading = tuple[str, tuple[str, ...], float]


class _Gauges(Collector):
    """Reads all gauges at once, at scrape time."""

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        families = {
            metric.name: GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for metric in contract.METRICS
            if metric.type == "gauge"
        }
        for name, labels, value in self._read():
            families[name].add_metric(labels, value)
        yield from families.values()


class Metrics:
    """Every metric of the contract, by its name there. `read_gauges` gives the present state."""

    def __init__(self, read_gauges: Callable[[], Iterable[Reading]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `*_created` series are not in the contract
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in contract.METRICS:
            if metric.type == "counter":
                self._counters[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=self._registry)
            elif metric.type == "histogram":
                self._histograms[metric.name] = Histogram(
                    metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self._registry
                )
        self._registry.register(_Gauges(read_gauges))
        # What `labels` finds takes longer than what is done with it, and some are moved once for each token.
        self._series: dict[tuple[str, tuple[tuple[str, str], ...]], Counter] = {}

    def count(self, name: str, labels: dict[str, str], amount: float = 1) -> None:
        self.series(name, labels).inc(amount)

    def series(self, name: str, labels: dict[str, str]) -> Counter:
        """One counter of those that go by this name."""
        key = name, tuple(labels.items())
        if (found := self._series.get(key)) is None:
            found = self._series[key] = self._counters[name].labels(**labels)
        return found

    def observe(self, name: str, labels: dict[str, str], value: float) -> None:
        self._histograms[name].labels(**labels).observe(value)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)
