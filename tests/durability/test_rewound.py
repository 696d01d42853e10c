"""The store goes back in time, by a power cut or by an operator: nobody may miss it silently."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import StreamReader, api
from foundation_nats.config import BusConfig, Config
from foundation_nats.errors import ServerError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.node.trimmer import Trimmer
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.disks import MortalDisk, can_mount
from tests.cluster import load as workload
from tests.conftest import AGENTS
from tests.durability.losses import Mode, servers_on

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(60)]
needs_disks = pytest.mark.skipif(can_mount() is not None, reason=can_mount() or "")

_MAX_FILE = 4 * 1024**3


@asynccontextmanager
async def on_mortal_disk(
    sync_interval: str, *, nodes: int = 1
) -> AsyncIterator[tuple[TestCluster, TestServer, MortalDisk]]:
    """A cluster whose server keeps its store on a disk that can lose its power."""
    with MortalDisk(512) as disk:
        config = EmbeddedConfig(store=disk.path, sync_interval=sync_interval, max_file=_MAX_FILE)
        async with (
            TestServer(config) as server,
            TestCluster(
                nodes=nodes,
                path=[str(AGENTS)],
                server=server,
                settings={"mailbox": {"signals_max_bytes": server.signals_max_bytes}},
            ) as running,
        ):
            yield running, server, disk


async def cut_power(nodes: TestCluster, server: TestServer, disk: MortalDisk) -> None:
    """Take the power from the broker's machine, and bring it back."""
    server.kill()
    disk.power_loss()
    await server.restart()
    await nodes.client.bus.wait_connected(10)


def sync_bucket(disk: MortalDisk, cluster: Cluster, kind: str) -> None:
    """Write one bucket back and nothing else, as the server's timer for it does."""
    sync_stream(disk, cluster.subjects.bucket_stream(kind))


def sync_stream(disk: MortalDisk, name: str) -> None:
    """Write one stream back."""
    (blocks,) = [path for path in disk.path.rglob("msgs") if path.parent.name == name]
    for path in blocks.iterdir():
        _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


async def add(cluster: Cluster, agent: str, count: int) -> None:
    """Send *count* signals of one each."""
    for _ in range(count):
        await cluster.send(agent, "counter.add", {"amount": 1})


async def note(cluster: Cluster, agent: str, numbers: Iterable[int]) -> None:
    """Send *numbers* to a ledger."""
    for number in numbers:
        await cluster.send(agent, "ledger.append", {"key": str(number)})


async def has_noted(
    cluster: Cluster, agent: str, numbers: Iterable[int], *, timeout: float = 8
) -> None:
    """Wait until the ledger's stored state holds *numbers*, each once and in order."""
    wanted = [str(number) for number in numbers]
    seen: list[str] = []

    async def noted() -> bool:
        stored = await cluster.agents.state(agent)
        assert stored is not None
        seen[:] = stored["state"]["applied"]
        return seen == wanted

    try:
        await eventually(noted, timeout=timeout, message=f"{agent} holds all")
    except AssertionError:
        assert seen == wanted
        raise


async def rewound(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Agents whose cursor followed the stream back: from where to where, by the events."""
    return {
        event.data["agent"]: (event.data["before"], event.data["after"])
        for event in await cluster.events.list(topic="agent")
        if event.what == "stream_rewound"
    }


async def said(cluster: Cluster, wanted: dict[str, tuple[int, int]]) -> bool:
    """Whether the events say so."""
    return await rewound(cluster) == wanted


async def has_counted(cluster: Cluster, agent: str, total: int, *, timeout: float = 8) -> None:
    """Wait until the stored state says *total*."""
    seen: list[object] = []

    async def counted() -> bool:
        stored = await cluster.agents.state(agent)
        assert stored is not None
        seen[:] = [stored["state"]["total"]]
        return bool(stored["state"]["total"] == total)

    await eventually(counted, timeout=timeout, message=f"{agent} counts {total}")


@needs_disks
async def test_a_cluster_under_sync_always_loses_nothing_in_a_power_cut() -> None:
    """The broker's machine loses its power under load: everything receipted takes effect once."""
    async with on_mortal_disk("always", nodes=2) as (nodes, server, disk):
        await workload.deploy(nodes)
        load = workload.Load(nodes.client)
        load.start()
        await eventually(lambda: load.receipts > 100, timeout=20, message="load flows")
        await cut_power(nodes, server, disk)
        receipts = load.receipts
        await eventually(
            lambda: load.receipts > receipts + 50, timeout=20, message="load flows again"
        )
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)


@needs_disks
async def test_what_is_receipted_after_a_power_cut_takes_effect() -> None:
    """The signals lost their tail, the state did not: new signals get numbers already counted.

    Every stream is synced by a timer of its own, so that this happens with 100 ms, too.
    """
    async with on_mortal_disk("2m") as (nodes, server, disk):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 10)
        await has_counted(cluster, "c", 10)
        disk.settle()
        await add(cluster, "c", 20)
        await has_counted(cluster, "c", 30)
        sync_bucket(disk, cluster, "state")
        await cut_power(nodes, server, disk)
        info = await StreamReader(cluster.bus, cluster.subjects.signals_stream).info()
        stored = await cluster.agents.state("c")
        assert stored is not None
        if info["state"]["last_seq"] != 10 or stored["state"]["total"] != 30:
            pytest.fail("void: not the situation in question", pytrace=False)
        await add(cluster, "c", 15)
        await has_counted(cluster, "c", 45)
        await eventually(
            lambda: said(cluster, {"c": (30, 10)}), message="an event says what happened"
        )


@needs_disks
async def test_the_new_tail_takes_effect_also_where_it_has_outgrown_the_cursor() -> None:
    """The same, but the agents' node is down until the new tail has outgrown the old cursors.

    Mirrors get what is emitted under the old numbers, too: their ids must be others.
    """
    async with on_mortal_disk("2m") as (nodes, server, disk):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await cluster.agents.start("fleet:Ledger", id="l", config={"mirror": "m"})
        await cluster.agents.start("fleet:Mirror", id="m")
        await note(cluster, "l", range(10))
        await add(cluster, "c", 5)
        await has_counted(cluster, "c", 5)
        await has_noted(cluster, "m", range(10))
        disk.settle()
        await note(cluster, "l", range(10, 30))
        await add(cluster, "c", 20)
        await has_counted(cluster, "c", 25)
        await has_noted(cluster, "m", range(30))
        await asyncio.sleep(1.2)  # published outboxes are cleared from the records
        sync_bucket(disk, cluster, "state")
        nodes.nodes["n1"].kill()
        await cut_power(nodes, server, disk)
        signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
        before = (await signals.info())["state"]["last_seq"]
        stored = await cluster.agents.state("c")
        assert stored is not None
        if before > 40 or stored["state"]["total"] != 25:
            pytest.fail("void: not the situation in question", pytrace=False)
        await note(cluster, "l", range(100, 130))
        await add(cluster, "c", 60)
        nodes.start_node("n1")
        await has_counted(cluster, "c", 85, timeout=30)
        await has_noted(cluster, "l", [*range(30), *range(100, 130)])
        await has_noted(cluster, "m", [*range(30), *range(100, 130)])
        assert set(await rewound(cluster)) == {"c", "l"}


@needs_disks
@pytest.mark.timeout(120)
async def test_three_servers_that_all_lose_their_power_are_no_exception(
    request: pytest.FixtureRequest,
) -> None:
    """R3: the log of SIGNALS lost its tail on all three, the others' logs did not."""
    if not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    async with AsyncExitStack() as stack:
        disks = [stack.enter_context(MortalDisk(384)) for _ in range(3)]
        servers = servers_on(Mode(3, "2m"), disks)
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        bus = await Bus.connect(BusConfig(servers=(servers[0].url,)), "ready")
        stack.push_async_callback(bus.close)
        await eventually(lambda: api(bus, "INFO"), timeout=20, message="a meta leader")
        nodes = await stack.enter_async_context(
            TestCluster(
                nodes=1,
                path=[str(AGENTS)],
                urls=[server.url for server in servers],
                settings={"replicas": 3, "mailbox": {"signals_max_bytes": 64 * 1024**2}},
            )
        )
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 10)
        await has_counted(cluster, "c", 10)
        for disk in disks:
            disk.settle()
        await add(cluster, "c", 20)
        await has_counted(cluster, "c", 30)
        signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
        group = (await signals.info())["cluster"]["raft_group"]
        for disk in disks:
            for path in disk.path.rglob("*"):
                if path.is_file() and not {group, signals.stream} & {*path.parts}:
                    _sync(path)
        for server in servers:
            server.kill()
        for disk in disks:
            disk.power_loss()
        await asyncio.gather(*(server.restart() for server in servers))
        await cluster.bus.wait_connected(20)
        for number in range(15):
            await cluster.send("c", "counter.add", {"amount": 1}, id=f"n{number}", timeout=30)
        await has_counted(cluster, "c", 45, timeout=30)
        await eventually(
            lambda: said(cluster, {"c": (30, 10)}), timeout=30, message="an event says it"
        )


@needs_disks
async def test_signals_for_many_go_on_after_their_stream_went_back() -> None:
    """ROUTES lost its tail, its consumer did not: what is sent to many then is expanded."""
    async with on_mortal_disk("2m") as (nodes, server, disk):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await cluster.send("everyone", "counter.add", {"amount": 1})
        await has_counted(cluster, "c", 1)
        disk.settle()
        for _ in range(9):
            await cluster.send("everyone", "counter.add", {"amount": 1})
        await has_counted(cluster, "c", 10)
        sync_bucket(disk, cluster, "state")
        sync_stream(disk, cluster.subjects.signals_stream)
        (kept,) = disk.path.rglob("obs/expander/o.dat")
        # Else it holds the first as delivered and not acknowledged, which waits until it is due again.
        await eventually(
            lambda: time.time() - kept.stat().st_mtime > 0.5, message="the consumer is written"
        )
        _sync(kept)
        await cut_power(nodes, server, disk)
        for _ in range(5):
            await cluster.send("everyone", "counter.add", {"amount": 1})
        await has_counted(cluster, "c", 15)


@needs_disks
async def test_a_state_that_went_back_fails_its_activation_and_is_taken_up_again() -> None:
    """The state lost its tail, the signals did not: the agent handles them anew, once each."""
    async with on_mortal_disk("2m") as (nodes, server, disk):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 10)
        await has_counted(cluster, "c", 10)
        disk.settle()
        await add(cluster, "c", 20)
        await has_counted(cluster, "c", 30)
        sync_stream(disk, cluster.subjects.signals_stream)
        await cut_power(nodes, server, disk)
        await add(cluster, "c", 5)
        await has_counted(cluster, "c", 35)


async def test_what_was_consumed_of_a_stream_that_went_back_is_not_trimmed() -> None:
    """The manager still has the old cursor: below it lies now what nobody has read."""
    async with TestServer() as server:
        config = Config.load(
            bus={"servers": (server.url,)},
            mailbox={"trim_every_s": 0.05, "trim_min_age_s": 0.0},
        )
        async with Cluster.connect(config=config) as cluster:
            for _ in range(10):
                await cluster.send("a", "x")
            signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
            trimmer = Trimmer(signals, cluster.subjects, config.mailbox)
            scope = TaskScope("trimmer")
            scope.start(trimmer.run(), "trimmer")
            trimmer.note({"a": (30, 30)}, prompt={"a"})
            await asyncio.sleep(0.2)  # several rounds
            trimmer.note({"a": (4, 34)}, prompt={"a"})

            async def trimmed() -> bool:
                return bool((await signals.info())["state"]["messages"] == 6)

            await eventually(trimmed, message="what is consumed by the new count is trimmed")
            await asyncio.sleep(0.1)
            assert await trimmed()
            await scope.close()


async def test_doctor_names_what_is_lost_and_makes_it_anew_when_told_to() -> None:
    """Without --repair nothing is made."""
    async with TestCluster(nodes=0) as nodes:
        cluster = nodes.client
        await cluster.send("somebody", "x")
        name = cluster.subjects.bucket_stream("state")
        await api(cluster.bus, "STREAM.DELETE", name)
        code, found = await doctor(nodes)
        assert code == 2
        (finding,) = [one for one in found if name in one["what"]]
        assert "foundation doctor --repair" in finding["fix"]
        assert name not in (await api(cluster.bus, "STREAM.NAMES"))["streams"]
        _, found = await doctor(nodes, "--repair")
        assert not [one for one in found if name in one["what"]]
        assert name in (await api(cluster.bus, "STREAM.NAMES"))["streams"]


async def doctor(nodes: TestCluster, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and findings of `foundation doctor`."""
    command = [sys.executable, "-m", "foundation_cli.main", "doctor", "-o", "json", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **nodes.config.to_environment()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        output, errors = await process.communicate()
    assert output, errors
    return process.returncode or 0, json.loads(output)["findings"]


async def test_a_deleted_signals_stream_is_a_clear_error_and_is_not_made_anew_by_nodes() -> None:
    """An operator deletes SIGNALS: sends fail in time and say why, asks go on, nobody moves."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 10)
        await has_counted(cluster, "c", 10)
        await api(cluster.bus, "STREAM.DELETE", cluster.subjects.signals_stream)
        with pytest.raises(FoundationError) as caught:
            await cluster.send("c", "counter.add", {"amount": 1}, timeout=1)
        assert caught.value.code == "bus.unavailable"
        assert "No stream takes" in caught.value.message
        assert await cluster.ask("c", "counter.get") == 10
        names = (await api(cluster.bus, "STREAM.NAMES"))["streams"]
        assert cluster.subjects.signals_stream not in names


async def test_a_signals_stream_made_anew_skips_nothing() -> None:
    """Deleted; a client refuses to make it anew; an operator does: what is receipted then counts."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 30)
        await has_counted(cluster, "c", 30)
        name = cluster.subjects.signals_stream
        await api(cluster.bus, "STREAM.DELETE", name)
        with pytest.raises(ServerError, match=f"has lost {name}") as caught:
            async with Cluster.connect(config=nodes.config, name="other"):
                pass
        assert caught.value.details["missing"] == [name]
        assert "foundation doctor --repair" in (caught.value.hint or "")
        async with Cluster.connect(config=nodes.config, name="operator", missing="make"):
            await add(cluster, "c", 15)
        await has_counted(cluster, "c", 45)
        # And past the number at which it was, as ever.
        await add(cluster, "c", 40)
        await has_counted(cluster, "c", 85)
        await eventually(
            lambda: said(cluster, {"c": (30, 0)}), message="an event says what happened"
        )


async def test_a_deleted_state_bucket_is_not_made_anew_under_live_agents() -> None:
    """Deleted, and made anew by the next who connects: what was counted is forgotten silently."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await add(cluster, "c", 15)
        await has_counted(cluster, "c", 15)
        await api(cluster.bus, "STREAM.DELETE", cluster.subjects.bucket_stream("state"))
        with pytest.raises(ServerError, match="has lost KV_fnd_test_state"):
            async with Cluster.connect(config=nodes.config, name="other"):
                pass
        names = (await api(cluster.bus, "STREAM.NAMES"))["streams"]
        assert cluster.subjects.bucket_stream("state") not in names


async def test_a_deleted_state_bucket_ends_no_worker() -> None:
    """A commit that finds no bucket is that agent's trouble, not that of its whole worker."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")
        await cluster.agents.start("fleet:Forgetful", id="bystander")
        assert await cluster.ask("bystander", "hello") == 1
        (worker,) = nodes.nodes["n1"].workers()
        await api(cluster.bus, "STREAM.DELETE", cluster.subjects.bucket_stream("state"))
        with pytest.raises(FoundationError):
            await cluster.ask("c", "counter.add", {"amount": 1}, timeout=2)
        assert [found.pid for found in nodes.nodes["n1"].workers()] == [worker.pid]
        assert await cluster.ask("bystander", "hello") == 2


async def test_everybody_can_connect_to_a_small_store() -> None:
    """900 MiB for JetStream: the first who connects leaves no room for the second's question."""
    async with TestServer(EmbeddedConfig(max_file=900 * 1024**2)) as server:
        config = Config.load(
            bus={"servers": (server.url,)},
            mailbox={"signals_max_bytes": server.signals_max_bytes},
        )
        for name in ("first", "second"):
            async with Cluster.connect(config=config, name=name) as cluster:
                account = await api(cluster.bus, "INFO")
        assert account["reserved_storage"] < 800 * 1024**2, "no reserve for state"
