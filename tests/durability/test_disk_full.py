"""A full disk and a full store are said aloud, lose nothing, and leave room for state."""

from __future__ import annotations

import asyncio
import time

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.bus.streams import StreamReader
from foundation_nats.errors import MailboxFullError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.disks import SmallDisk, can_mount
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_MIB = 1024**2
_TIMEOUT_S = 1.0


async def refused(cluster: Cluster, target: str, id: str) -> FoundationError:
    """The error of a send that fails; it must come in time."""
    started = time.monotonic()
    with pytest.raises(FoundationError) as caught:
        await cluster.send(target, "ledger.append", {"key": id}, id=id, timeout=_TIMEOUT_S)
    assert time.monotonic() - started < _TIMEOUT_S + 1, "the sender hung"
    return caught.value


@pytest.mark.slow
@pytest.mark.skipif(can_mount() is not None, reason=can_mount() or "")
async def test_a_full_disk_is_told_to_senders_and_loses_nothing() -> None:
    """The volume fills up under load; with room again and a restart everything receipted is there.

    The operator has allowed the server more than the volume holds (F8); that is the only way
    in which a volume of the server's own can fill up.
    """
    with SmallDisk(64) as disk:
        config = EmbeddedConfig(store=disk.path, max_file=2048 * _MIB)
        async with (
            TestServer(config) as server,
            TestCluster(
                nodes=2,
                path=[str(AGENTS)],
                server=server,
                settings={"mailbox": {"signals_max_bytes": server.signals_max_bytes}},
            ) as nodes,
        ):
            await workload.deploy(nodes)
            load = workload.Load(nodes.client)
            load.start()
            await eventually(lambda: load.receipts > 100, message="load flows")
            disk.fill()

            async def stopped() -> bool:
                before = load.receipts
                await asyncio.sleep(0.5)
                return load.receipts == before

            await eventually(stopped, message="nothing is receipted any more")
            for number in range(2):
                error = await refused(nodes.client, "nobody", f"late-{number}")
                # Nobody may take it for stored, nor for certainly not stored.
                assert error.code == "bus.timeout", error
                assert error.retryable, error
            assert server.is_running
            # Nodes live on memory and heartbeats: a full disk moves nobody.
            assert {node.status for node in await nodes.client.nodes.list()} == {"up"}
            disk.free()
            await server.restart()
            receipts = load.receipts
            await eventually(
                lambda: load.receipts > receipts + 100, timeout=20, message="load flows again"
            )
            history = await load.stop()
            assert set(history.errors) <= {"bus.timeout", "bus.unavailable"}, history.errors
            await workload.verdict(nodes, history)
            await workload.everyone_runs_once(nodes)
            downs = [
                event
                for event in await nodes.client.events.list(topic="node")
                if event.what == "down"
            ]
            assert not downs, downs


async def fill_mailbox(cluster: Cluster, target: str, *, pad: int) -> MailboxFullError:
    """Send until the store refuses; the refusal."""
    for _ in range(10_000):
        try:
            await cluster.send(target, "counter.add", {"amount": 1, "pad": "x" * pad})
        except MailboxFullError as error:
            return error
    raise AssertionError("the mailbox never gets full")


async def test_full_mailboxes_leave_room_for_state() -> None:
    """max_bytes of the signals is used up: sends are refused with a reason, state commits go on."""
    settings = {"mailbox": {"signals_max_bytes": _MIB}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        error = await fill_mailbox(cluster, "absent", pad=10_000)
        assert error.retryable
        assert "full" in error.message
        await fill_mailbox(cluster, "absent", pad=0)
        with pytest.raises(MailboxFullError):
            await cluster.send("c", "counter.add", {"amount": 1})
        for expected in range(1, 21):
            assert await cluster.ask("c", "counter.add", {"amount": 1}) == expected
        stored = await cluster.agents.state("c")
        assert stored is not None
        assert stored["state"]["total"] == 20
        # The mailbox is emptied by an operator: everybody can send again.
        signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
        assert await signals.purge(cluster.subjects.mailbox("absent")) > 90
        await cluster.send("c", "counter.add", {"amount": 1})

        async def counted() -> bool:
            return bool(await cluster.ask("c", "counter.get") == 21)

        await eventually(counted, message="the signal is applied")


async def test_a_full_mailbox_fills_no_other() -> None:
    """The limit per mailbox comes first: the neighbour takes signals, and the full one catches up."""
    settings = {"mailbox": {"mailbox_max": 50}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        error = await fill_mailbox(cluster, "absent", pad=0)
        assert "mailbox" in error.message
        await cluster.send("c", "counter.add", {"amount": 1})

        async def counted() -> bool:
            return bool(await cluster.ask("c", "counter.get") == 1)

        await eventually(counted, message="the neighbour counts")
        await cluster.agents.start("fleet:Counter", id="absent")
        assert await cluster.ask("absent", "counter.get", timeout=5) == 50

        async def room() -> bool:
            await cluster.send("absent", "counter.add", {"amount": 1}, timeout=1)
            return True

        await eventually(room, timeout=15, message="what was consumed makes room")
