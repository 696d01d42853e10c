"""Who does not read is cut off or loses what it did not read, is told so, and slows nobody down."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlparse

import pytest

from foundation_nats import Cluster
from foundation_nats.errors import MailboxFullError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.observe.taps import QUEUE_MAX
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]

_MIB = 1024**2
_SLOW_S = 2.0
"""Longer than anything here takes on a busy machine, and shorter than any time-out that helps."""


def deaf_subscriber(url: str, subject: str) -> socket.socket:
    """A client that subscribes, and never reads again."""
    parsed = urlparse(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    client.connect((parsed.hostname, parsed.port))
    client.sendall(
        b"CONNECT " + json.dumps({"verbose": False, "name": "deaf"}).encode() + b"\r\n"
        b"SUB " + subject.encode() + b" 1\r\nPING\r\n"
    )
    heard = b""
    while b"PONG\r\n" not in heard:
        heard += client.recv(4096)
    return client


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    """Seconds that a call takes."""
    started = time.monotonic()
    await call()
    return time.monotonic() - started


async def counts(cluster: Cluster, agent: str, total: int) -> None:
    """Wait until *agent* has counted to *total*."""

    async def counted() -> bool:
        return bool(await cluster.ask(agent, "counter.get") == total)

    await eventually(counted, timeout=15, message=f"{agent} counts {total}")


async def test_a_subscriber_that_does_not_read_is_cut_off_by_the_server_and_slows_nobody() -> None:
    """A client of any language follows all live copies and stops reading: only it is dropped."""
    async with (
        TestServer(EmbeddedConfig(extra=f"max_pending: {2 * _MIB}")) as server,
        TestCluster(nodes=1, path=[str(AGENTS)], server=server) as nodes,
    ):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        deaf = deaf_subscriber(server.url, cluster.subjects.live("*"))
        try:
            pad = "x" * 100_000
            slowest = 0.0
            for _ in range(150):
                signal = {"amount": 1, "pad": pad}
                slowest = max(
                    slowest, await timed(lambda data=signal: cluster.send("c", "counter.add", data))
                )
                slowest = max(slowest, await timed(lambda: cluster.ask("c", "counter.get")))
            await counts(cluster, "c", 150)
            assert slowest < _SLOW_S
            assert "Slow Consumer" in server.log_tail(50)
            assert await asyncio.to_thread(_is_ended, deaf)
        finally:
            deaf.close()
        assert [node.status for node in await cluster.nodes.list()] == ["up"]
        (agent,) = await cluster.agents.list()
        assert (agent.status, agent.epoch) == ("running", 1)


def _is_ended(client: socket.socket) -> bool:
    """Whether the server has closed the connection, behind what it had still sent."""
    try:
        while client.recv(_MIB):
            pass
    except ConnectionResetError:
        return True
    return True


async def test_a_tap_that_is_not_read_drops_the_oldest_and_says_how_many() -> None:
    """Ours never gets as far: the queue of a tap is bounded, and the newest are kept."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        total = QUEUE_MAX + 500
        async with cluster.taps.open(agent="c") as tap:
            for start in range(0, total, 500):
                batch = range(start, start + 500)
                await asyncio.gather(
                    *(cluster.send("c", "counter.add", {"amount": 1}, id=f"s{n}") for n in batch)
                )
            slowest = max([await timed(lambda: cluster.ask("c", "counter.get")) for _ in range(20)])
            await counts(cluster, "c", total)
            assert slowest < _SLOW_S
            await eventually(lambda: tap.dropped >= 500, message="the tap says what it dropped")
            async for item in tap:
                assert int(item.sequence) > 500
                break


async def test_an_agent_slower_than_its_senders_fills_its_own_mailbox_and_no_other() -> None:
    """Backlog stays in the stream, the senders are told, the neighbour is as quick as ever."""
    settings = {"mailbox": {"mailbox_max": 300, "in_memory_max": 32, "trim_every_s": 0.2}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Difficult", id="slow")
        await cluster.agents.start("fleet:Counter", id="quick")
        receipts = 0
        refusals: list[MailboxFullError] = []
        slowest = 0.0
        while len(refusals) < 20:
            try:
                await cluster.send("slow", "wait", 0.01)
                receipts += 1
            except MailboxFullError as error:
                refusals.append(error)
                slowest = max(slowest, await timed(lambda: cluster.ask("quick", "counter.get")))
        assert receipts >= 300
        assert all(error.retryable and "mailbox" in error.message for error in refusals)
        (node,) = await cluster.nodes.list()
        assert node.load is not None
        assert node.load["backlog"] <= 2 * 32
        assert slowest < _SLOW_S
        await cluster.send("quick", "counter.add", {"amount": 1})
        await counts(cluster, "quick", 1)

        async def all_handled() -> bool:
            stored = await cluster.agents.state("slow")
            assert stored is not None
            info = await cluster.agents.get("slow")
            return bool(stored["cursor"] >= receipts and info.status == "running")

        await eventually(all_handled, timeout=20, message="nothing receipted is lost")
        assert not await cluster.dead.list()
