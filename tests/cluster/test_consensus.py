"""Proposers are killed, the broker is killed: one order, no lost and no doubled operation."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from foundation_nats import Cluster, Config
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.streams import api
from foundation_nats.chaos.checkers.linearizable import check_linearizable
from foundation_nats.chaos.history import Operation
from foundation_nats.chaos.workloads.domains import Append, Cells, Write
from foundation_nats.consensus import replica as replica_module
from foundation_nats.consensus.domain import ProposalStatus
from foundation_nats.errors import BusUnavailableError
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.brokers import Brokers
from foundation_nats.testing.links import Link
from tests.cluster import proposer
from tests.cluster.children import Child, Children
from tests.cluster.domains import Store
from tests.cluster.test_replicated import stream_leader

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

_MODULE = "tests.cluster.proposer"


async def _settle(cluster: Cluster, history: list[Operation]) -> Cells:
    """Propose again, as another process, every append whose outcome nobody knows."""
    for operation in history:
        if operation.f == "append" and operation.outcome == "unknown":
            found = await cluster.consensus.propose(
                Store, Append(item=operation.value), id=operation.value, timeout=10
            )
            assert found.accepted, found
    return await cluster.consensus.read(Store, timeout=10)


def _check_appends(history: list[Operation], items: list[str]) -> None:
    counts = Counter(items)
    assert not [item for item, n in counts.items() if n > 1], "took effect twice"
    outcomes: dict[str, set[str]] = {}
    for operation in history:
        if operation.f == "append":
            outcomes.setdefault(operation.value, set()).add(operation.outcome)
    for item, seen in outcomes.items():
        if seen == {"fail"}:
            assert item not in counts, f"{item} was said to have failed and is there"
        else:
            assert item in counts, f"{item} was accepted or settled and is lost"


def _check_registers(history: list[Operation]) -> None:
    registers = [o for o in history if o.f in ("read", "write", "cas")]
    for operation in registers:
        if operation.f == "cas":
            operation.value = tuple(operation.value)
    judgement = check_linearizable(registers)
    assert not judgement.violations, judgement.violations
    assert not judgement.undecided, judgement.undecided


@pytest.mark.parametrize("broker_dies", [False, True])
async def test_proposers_are_killed_while_they_propose(
    tmp_path: Path, server: TestServer, broker_dies: bool
) -> None:
    """SIGKILL of proposers (and of the broker): linearizable, and exactly once by the log."""
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)
    names = ["p0", "p1", "p2"]
    journals = {name: tmp_path / name for name in names}
    log: list[tuple[int, str, str | None]] = []

    def launch(children: Children, name: str) -> Child:
        arguments = (server.url, name, str(journals[name]), str(dice.randrange(1 << 30)))
        return children.start(_MODULE, *arguments)

    with Children() as children:
        async with Cluster.connect(server.url, name="observer") as cluster:
            watched = await cluster.consensus.open(Store)
            watched.on_applied(lambda a, _: log.append((a.revision, a.id, a.skipped)))
            running = {name: launch(children, name) for name in names}
            for child in running.values():
                await eventually(lambda child=child: child.said("ready"), message="it proposes")
            end = monotonic() + 4
            killed_broker = not broker_dies
            kills = 0
            while monotonic() < end:
                victim = dice.choice(names)
                await eventually(lambda victim=victim: running[victim].said("ready"), timeout=20)
                await asyncio.sleep(dice.uniform(0.1, 0.5))
                running[victim].kill()
                kills += 1
                if not killed_broker and kills == 3:
                    server.kill()
                    await asyncio.sleep(0.3)
                    await server.restart()
                    killed_broker = True
                running[victim] = launch(children, victim)
            # The last ones must have had time to repeat what was left open.
            for child in running.values():
                await eventually(lambda child=child: child.said("ready"), timeout=20)
            for child in running.values():
                child.kill()
            crashed = [line for child in children.all for line in child.said("Traceback")]
            assert not crashed, [child.lines()[-5:] for child in children.all]
            history = [o for journal in journals.values() for o in proposer.load(journal)]
            state = await _settle(cluster, history)
            async with Cluster.connect(server.url, name="late") as late:
                assert await late.consensus.read(Store) == state
    _check_appends(history, state.items)
    done = [o for o in history if o.outcome == "ok"]
    assert len(done) > 50, f"void: only {len(done)} operations"
    assert any(o.outcome == "unknown" for o in history), "void: no operation was cut off"
    ids = [id for _, id, _ in log]
    assert len(ids) == len(set(ids)), "an id is in the log twice"
    assert not [entry for entry in log if entry[2] is not None]
    assert [revision for revision, *_ in log] == sorted({revision for revision, *_ in log})
    _check_registers(history)


@pytest.mark.slow
async def test_three_copies_lose_their_leader(tmp_path: Path) -> None:
    """SIGKILL of the broker that leads the log, which comes back later: linearizable, exactly once."""
    async with Brokers() as brokers, AsyncExitStack() as stack:
        urls = brokers.urls
        config = Config.load(cluster="c", replicas=3)
        clients = [
            await stack.enter_async_context(
                Cluster.connect([*urls[n:], *urls[:n]], name=f"p{n}", config=config)
            )
            for n in range(3)
        ]
        journals = [tmp_path / f"p{n}" for n in range(3)]
        files = [stack.enter_context(journal.open("a")) for journal in journals]
        proposers = [
            proposer.Proposer(client, f"p{n}", files[n], n) for n, client in enumerate(clients)
        ]
        stopping = asyncio.Event()

        async def propose(one: proposer.Proposer) -> None:
            while not stopping.is_set():
                await one.step()
                await asyncio.sleep(0.01)

        for one in proposers:
            await one.open()
        tasks = [asyncio.create_task(propose(one)) for one in proposers]
        await asyncio.sleep(1)
        stream = clients[0].subjects.domain_stream("store")
        victim = brokers.named(await stream_leader(clients[0], stream))
        victim.kill()
        replica = await clients[0].consensus.open(Store)
        before = replica.revision
        await eventually(
            lambda: replica.revision > before + 40, timeout=40, message="it goes on without it"
        )
        await victim.restart()
        await asyncio.sleep(1)
        stopping.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        history = [operation for journal in journals for operation in proposer.load(journal)]
        state = await _settle(clients[0], history)
        for client in clients:
            assert await client.consensus.read(Store, timeout=20, barrier=True) == state
    _check_appends(history, state.items)
    _check_registers(history)


async def test_an_unknown_outcome_is_found_out(server: TestServer) -> None:
    """The answer is lost on the wire: unknown with an id, then `status` knows, a repeat is harmless."""
    host, port = server.url.removeprefix("nats://").split(":")
    async with (
        await Link.open(host, int(port)) as link,
        Cluster.connect(link.url, name="far") as far,
        Cluster.connect(server.url, name="near") as near,
    ):
        assert (await far.consensus.propose(Store, Append(item="0"))).accepted
        link.hold()
        lost = await far.consensus.propose(Store, Append(item="1"), id="in-doubt", timeout=0.5)
        assert lost.status is ProposalStatus.UNKNOWN
        assert not lost.final
        assert (await near.consensus.read(Store)).items == ["0"]
        # While it is on its way another process settles it.
        settled = await near.consensus.propose(Store, Append(item="1"), id="in-doubt")
        assert settled.accepted
        link.release()

        async def known() -> bool:
            return await far.consensus.status("in-doubt", timeout=1) == settled

        await eventually(known, timeout=20)
        link.hold()
        lost = await far.consensus.propose(Store, Append(item="2"), id="second", timeout=0.5)
        assert lost.status is ProposalStatus.UNKNOWN
        overtaken = await near.consensus.propose(Store, Append(item="3"), id="overtaker")
        link.heal()

        async def never() -> bool:
            found = await far.consensus.status("second", timeout=1)
            return found.status is ProposalStatus.NOT_FOUND and found.final

        await eventually(never, timeout=20)
        again = await far.consensus.propose(Store, Append(item="2"), id="second")
        assert again.revision > overtaken.revision
        assert (await near.consensus.read(Store)).items == ["0", "1", "3", "2"]


async def test_without_a_server_nothing_is_accepted_and_that_is_said(server: TestServer) -> None:
    """Not connected means not sent: a known outcome."""
    async with Cluster.connect(server.url) as cluster:
        await cluster.consensus.propose(Store, Write(key="a", value="1"))
        server.kill()
        await eventually(lambda: not cluster.bus.is_connected)
        with pytest.raises(BusUnavailableError, match="nothing was accepted"):
            await cluster.consensus.propose(Store, Write(key="a", value="2"), timeout=0.5)
        assert (await cluster.consensus.view(Store)).values == {"a": "1"}
        await server.restart()
        await cluster.bus.wait_connected(10)
        found = await cluster.consensus.read(Store, timeout=10)
        assert found.values == {"a": "1"}


async def test_a_log_that_went_back_in_time_is_read_anew(
    server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is lost with all it held: a replica doesn't go on from a state that nobody has."""
    monkeypatch.setattr(replica_module, "_REWOUND_AFTER_S", 0.5)
    async with Cluster.connect(server.url) as cluster:
        for n in range(5):
            await cluster.consensus.propose(Store, Append(item=f"{n}"))
        replica: Any = await cluster.consensus.open(Store)
        await api(cluster.bus, "STREAM.DELETE", replica._log.reader.stream)
        await replica._log.ensure(replicas=1)
        found = await cluster.consensus.propose(Store, Append(item="new"), timeout=10)
        assert found.accepted
        assert (await cluster.consensus.read(Store)).items == ["new"]

        async def announced() -> bool:
            return "rewound" in {e.what for e in await cluster.events.list(topic="domain")}

        await eventually(announced)


@pytest.mark.parametrize("first", ["read", "propose", "wait"])
@pytest.mark.parametrize("grown", [0, 2])
async def test_a_log_that_was_replaced_while_nobody_looked_is_noticed(
    server: TestServer, first: str, grown: int
) -> None:
    """It has grown to the same length, or beyond: its numbers alone tell nothing."""
    async with (
        await Link.open("127.0.0.1", int(server.url.rpartition(":")[2])) as link,
        Cluster.connect(server.url) as other,
        Cluster.connect(link.url) as cluster,
    ):
        for n in range(3):
            await cluster.consensus.propose(Store, Append(item=f"old{n}"))
        survivor: Any = await cluster.consensus.open(Store)
        link.cut()
        await eventually(lambda: not cluster.bus.is_connected, timeout=15)
        await api(other.bus, "STREAM.DELETE", survivor._log.reader.stream)
        new = [f"new{n}" for n in range(3 + grown)]
        for item in new:
            await other.consensus.propose(Store, Append(item=item))
        link.heal()
        await cluster.bus.wait_connected(20)
        if first == "read":
            assert (await survivor.read(timeout=10)).items == new
        if first == "wait":
            await eventually(lambda: survivor.view.items == new, timeout=15)
        found = await survivor.propose(Append(item="mine"), timeout=10)
        assert found.accepted
        assert (await other.consensus.read(Store)).items == [*new, "mine"]
        assert survivor.view.items == [*new, "mine"]
