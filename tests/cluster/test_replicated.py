"""Three brokers, three copies: a broker's death is a pause of the writes and no node's death."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.bus.streams import api
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def three_brokers() -> AsyncIterator[dict[str, TestServer]]:
    """A NATS cluster of three servers on loopback, by server name."""
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    servers = [
        TestServer(
            EmbeddedConfig(
                extra=f'cluster {{ name: C, listen: "127.0.0.1:{port}", routes: [{routes}] }}'
            )
        )
        for port in ports
    ]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        yield {server.name: server for server in servers}


async def stream_leader(cluster: Cluster, stream: str) -> str:
    """The name of the server that leads *stream*."""
    info = await api(cluster.bus, "STREAM.INFO", stream)
    return str(info["cluster"]["leader"])


@pytest.mark.slow
async def test_a_dead_stream_leader_stalls_writes_and_moves_nobody() -> None:
    """SIGKILL of the broker that leads the mailboxes: asks go on, no node is declared down (F1-F3)."""
    async with three_brokers() as brokers:
        urls = [server.url for server in brokers.values()]
        async with TestCluster(
            nodes=3, workers=1, path=[str(AGENTS)], urls=urls, settings={"replicas": 3}
        ) as nodes:
            cluster = nodes.client
            await workload.deploy(nodes)
            homes = {info.id: (info.node, info.epoch) for info in await cluster.agents.list()}
            load = workload.Load(cluster)
            load.start()
            await eventually(lambda: load.receipts > 100, message="load flows")
            victim = brokers[await stream_leader(cluster, cluster.subjects.signals_stream)]
            victim.kill()
            killed_at = time.monotonic()
            before = load.receipts

            async def writes_again() -> bool:
                return load.receipts > before + 50

            await eventually(writes_again, timeout=40, message="signals are stored again")
            print(f"writes back after {time.monotonic() - killed_at:.1f} s")
            history = await load.stop()
            await workload.verdict(nodes, history)
            await workload.everyone_runs_once(nodes)
            after = {info.id: (info.node, info.epoch) for info in await cluster.agents.list()}
            assert after == homes, "an agent was moved although no node had died"
            events = await cluster.events.list(topic="node")
            assert not [event for event in events if event.what == "down"]
            await victim.restart()
            for _ in range(20):
                try:
                    await cluster.ask("ledger-0", "ledger.length", timeout=2)
                except FoundationError:
                    await asyncio.sleep(0.1)
                else:
                    break
            else:
                pytest.fail("no ask was answered")
