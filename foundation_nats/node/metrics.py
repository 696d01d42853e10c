"""`Metrics`: what Prometheus reads of one node, in the text format, on an address of its own.

Off unless asked for (``--metrics``), and behind the extra ``metrics``: the library is imported when it
is. It serves from a thread of its own and reads what the manager knows anyway, so a scrape costs
the agents nothing. The counters are those of the workers, since each began: a worker
that was started again counts from nought, as Prometheus expects of counters.

The cluster has no counters of its own: sum over the nodes. The number of dead letters is that of the
whole cluster, and the same on every node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from foundation_nats.base.logs import get_logger
from foundation_nats.bus.streams import StreamReader
from foundation_nats.errors import BusError, ConfigError, FoundationError
from foundation_schemas import Load

if TYPE_CHECKING:
    from prometheus_client import Metric

_DEAD_EVERY_S = 5.0
_ANSWER_S = 5.0
"""How long a scrape waits for a node that is busy."""
_COUNTERS = {
    "handled": ("signals_handled", "Signals that took effect."),
    "answered": ("asks_answered", "Questions that were answered, by errors too."),
    "given_up": ("signals_given_up", "Signals that became dead letters."),
    "commits": ("commits", "Records that were stored."),
    "failovers": ("failovers", "Agents taken over from a node or worker that had died."),
}
_BREAKER = {"closed": 0, "half_open": 1, "open": 2}


class Figures(Protocol):
    """What a node knows of its agents and workers."""

    def statuses(self) -> dict[str, int]:
        """How many agents are in which condition."""

    def figures(self) -> dict[str, tuple[dict[str, int], dict[str, str]]]:
        """Worker to its counters and its breakers."""


class Metrics:
    """The exporter of one node."""

    def __init__(
        self,
        node: str,
        figures: Figures,
        load: Callable[[], Load],
        is_leader: Callable[[], bool],
    ) -> None:
        self._node = node
        self._figures = figures
        self._load = load
        self._is_leader = is_leader
        self._loop = asyncio.get_running_loop()
        self._dead: int | None = None
        self._served: tuple[Any, Any] | None = None
        self._log = get_logger("metrics")

    def serve(self, address: str) -> None:
        """Answer scrapes on ``HOST:PORT`` until `close`.

        Raises:
            ConfigError: the extra is not installed, or the address can't be used.
        """
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ConfigError(
                "Metrics need prometheus-client, which is not installed.",
                hint="pip install 'foundation-nats[metrics]'",
            ) from error
        registry = CollectorRegistry()
        registry.register(self)
        host, _, port = address.rpartition(":")
        try:
            self._served = start_http_server(int(port), addr=host, registry=registry)
        except (OSError, ValueError) as error:
            raise ConfigError(f"Metrics can't be served on {address}: {error}.") from error
        self._log.info("metrics are served", address=address)

    async def count_dead(self, dead: StreamReader) -> None:
        """Look at the number of dead letters, for ever."""
        while True:
            try:
                self._dead = int((await dead.info())["state"]["messages"])
            except (BusError, FoundationError) as error:
                self._log.debug("dead letters not counted", error=str(error))
            await asyncio.sleep(_DEAD_EVERY_S)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        if self._served is not None:
            server, thread = self._served
            self._served = None
            server.shutdown()
            server.server_close()
            thread.join(2.0)

    def describe(self) -> Iterable[Metric]:
        """Nothing is collected to find out the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now; called from the server's thread, answered by the node's."""
        found: Future[list[Metric]] = Future()

        def look() -> None:
            if not found.cancelled():
                try:
                    found.set_result(list(self._now()))
                except Exception as error:
                    found.set_exception(error)

        self._loop.call_soon_threadsafe(look)
        return iter(found.result(timeout=_ANSWER_S))

    def _now(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        node = [self._node]

        def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
            family = GaugeMetricFamily(f"foundation_{name}", text, labels=["node"])
            family.add_metric(node, value)
            return family

        load = self._load()
        yield gauge("backlog", "Signals received and not yet handled.", load.backlog)
        yield gauge("loop_lag_seconds", "Worst event-loop lag of its workers.", load.lag_ms / 1000)
        yield gauge("leader", "Whether this node leads.", float(self._is_leader()))
        if self._dead is not None:
            yield gauge("dead_letters", "Dead letters in the whole cluster.", self._dead)
        agents = GaugeMetricFamily(
            "foundation_agents", "Agents of this node.", labels=["node", "status"]
        )
        for status, count in sorted(self._figures.statuses().items()):
            agents.add_metric([self._node, status], count)
        yield agents
        figures = self._figures.figures()
        for key, (name, text) in _COUNTERS.items():
            family = CounterMetricFamily(f"foundation_{name}", text, labels=["node", "worker"])
            for worker, (counters, _) in sorted(figures.items()):
                family.add_metric([self._node, worker], counters.get(key, 0))
            yield family
        breakers = GaugeMetricFamily(
            "foundation_breaker_state",
            "Circuit breakers of handlers' calls: 0 closed, 1 half open, 2 open.",
            labels=["node", "worker", "breaker"],
        )
        for worker, (_, states) in sorted(figures.items()):
            for name, state in sorted(states.items()):
                breakers.add_metric([self._node, worker, name], _BREAKER.get(state, 2))
        yield breakers
