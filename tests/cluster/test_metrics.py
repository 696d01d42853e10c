"""What a node tells Prometheus, what breakers tell, and the guards of a client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request

import pytest

from foundation_nats.base.resilience import BreakerState
from foundation_nats.errors import BreakerOpenError, OverloadError
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.brokers import free_port
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


def _values(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines)}


async def test_metrics_of_a_node_and_its_breakers() -> None:
    """Agents, signals, dead letters, commits, breakers, failovers; and events of each turn."""
    port = free_port()

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return _values(answer.read().decode())

    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        node = nodes.start_node("n1", "--metrics", str(port))
        await nodes.wait_up(["n1"])
        await cluster.agents.start("lanes:Caller", id="a")
        for _ in range(3):
            await cluster.send("a", "call", 1)
        await cluster.send("a", "call", 0, attempts=1)
        assert await cluster.ask("a", "calls") == 3

        async def seen() -> dict[str, float]:
            found = await asyncio.to_thread(scrape)
            assert found['foundation_agents{node="n1",status="running"}'] == 1
            assert found['foundation_signals_handled_total{node="n1",worker="n1-w0"}'] == 3
            assert found['foundation_signals_given_up_total{node="n1",worker="n1-w0"}'] == 1
            assert found['foundation_asks_answered_total{node="n1",worker="n1-w0"}'] == 1
            assert found['foundation_commits_total{node="n1",worker="n1-w0"}'] >= 2
            name = 'foundation_breaker_state{breaker="peer",node="n1",worker="n1-w0"}'
            assert found[name] in (1, 2), "half open once its pause is over"
            assert found['foundation_leader{node="n1"}'] == 1
            assert found['foundation_dead_letters{node="n1"}'] == 1
            return found

        await eventually(seen, timeout=15)
        (one,) = await cluster.reported_breakers()
        assert (one.source, one.target, one.kind, one.state, one.opened) == (
            "worker:n1-w0",
            "peer",
            "call",
            BreakerState.OPEN,
            1,
        )
        command = [sys.executable, "-m", "foundation_cli.main", "breakers", "-o", "json"]
        command += ["-s", nodes.server.url, "-c", "test"]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [item["target"] for item in json.loads(done.stdout)] == ["peer"]

        async def mended() -> bool:
            await cluster.send("a", "call", 1, attempts=1)
            return [item.state for item in await cluster.reported_breakers()] == ["closed"]

        await eventually(mended, timeout=10, every=0.2)
        told = [event.what for event in await cluster.events.list(topic="breaker")]
        assert told == ["opened", "half_open", "closed"]
        for worker in node.workers():
            worker.kill()

        async def taken_over() -> bool:
            found = await asyncio.to_thread(scrape)
            return found.get('foundation_failovers_total{node="n1",worker="n1-w0"}') == 1

        await eventually(taken_over, timeout=20)


async def test_a_client_has_guards_of_its_own() -> None:
    """The same as handlers have; what its breakers do is told."""
    async with TestCluster(nodes=0) as nodes:
        guards = nodes.client.guards
        calls = 0

        async def fail() -> None:
            nonlocal calls
            calls += 1
            async with guards.breaker("mail", failures=2):
                raise OSError("no mail today")

        with pytest.raises(BreakerOpenError):
            await guards.retrying(fail, attempts=9, first_s=0.01, on=(OSError, BreakerOpenError))
        assert calls == 3, "an open breaker is not tried again"
        await guards.limiter("mail", rate=1).wait()
        with pytest.raises(OverloadError):
            await guards.limiter("mail", rate=1).wait()
        async with guards.bulkhead("mail", limit=1, wait_s=0.01):
            with pytest.raises(OverloadError):
                async with guards.bulkhead("mail", limit=1, wait_s=0.01):
                    pass

        async def told() -> bool:
            found = await nodes.client.reported_breakers()
            return [(item.source, item.target) for item in found] == [("client:test", "mail")]

        await eventually(told, timeout=5)


async def test_a_port_that_is_taken_is_named() -> None:
    """The node does not start without what it was asked for."""
    async with TestCluster(nodes=0) as nodes:
        port = nodes.server.url.rpartition(":")[2]
        node = nodes.start_node("n1", "--metrics", f"127.0.0.1:{port}")
        assert await node.wait() != 0
        assert "Metrics can't be served" in node.log_tail()
