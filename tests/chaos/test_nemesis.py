"""Each sort of trouble really is the trouble that it is called: the instrument is tested, not the cluster."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from foundation_nats.base.clock import monotonic, utc_now
from foundation_nats.chaos.checkers import check_exits
from foundation_nats.chaos.faults import Fault
from foundation_nats.chaos.lab import Lab
from foundation_nats.chaos.nemesis import Done, Nemesis
from foundation_nats.chaos.workloads.base import manifest_text
from foundation_nats.errors import FoundationError
from foundation_nats.testing import eventually
from foundation_nats.testing.disks import can_throttle
from foundation_nats.testing.links import Link
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

SABOTEUR = "saboteur-0"


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    """One node behind links, and an agent that does what agents should not do."""
    async with Lab(seed=1, nodes=1, path=[str(AGENTS)]) as opened:
        await deploy(opened)
        yield opened


async def deploy(lab: Lab) -> None:
    """The saboteur."""
    run = "foundation_nats.chaos.agents:Saboteur"
    entry = {"name": "saboteur", "run": run, "replicas": 1}
    await lab.eye.deployments.apply(manifest_text([entry]))
    await lab.eye.deployments.wait_settled(["saboteur"], timeout=20)


async def do(lab: Lab, kind: str, seconds: float, strength: float = 0.0) -> Done:
    """Carry out one fault from its beginning to its end."""
    nemesis = Nemesis(lab, [Fault(0, kind, 0, seconds, strength)], [SABOTEUR])
    await nemesis.run()
    (done,) = nemesis.done
    return done


async def test_a_node_that_ends_unasked_is_started_again_and_told_of(lab: Lab) -> None:
    """One that the plan ends is the plan's; a kill from elsewhere is written down and not understood."""
    planned = lab.node("n1").pid
    assert not (await do(lab, "node.kill", 0.1)).skipped
    assert lab.node("n1").pid != planned
    assert lab.exits == [], "that was the plan"
    stranger = lab.node("n1").process.pid
    os.kill(stranger, signal.SIGKILL)
    await eventually(lambda: lab.node("n1").pid != stranger, message="it is started again")
    (found,) = lab.exits
    assert (found.node, found.code, found.sort) == ("n1", -signal.SIGKILL, "killed")
    assert found.begin_s + 0.4 < found.end_s < found.begin_s + 5
    assert not check_exits(lab.exits).is_clean


async def test_a_node_that_dies_at_a_crash_point_is_known_by_it() -> None:
    """Here whoever leads dies at its second renewal."""
    armed = {"FOUNDATION_FAILPOINTS": "lease.renew=once(2,kill)"}
    quick = {"lease": {"renew_every_s": 0.5}}
    async with Lab(seed=1, nodes=1, environment=armed, settings=quick) as lab:
        first = lab.node("n1").pid
        await eventually(lambda: lab.node("n1").pid != first, message="it is started again")
        (found,) = lab.exits
        assert (found.sort, found.why) == ("crash point", "lease.renew")
        assert check_exits(lab.exits).is_clean


@asynccontextmanager
async def under(lab: Lab, kind: str, seconds: float, strength: float = 0.0) -> AsyncIterator[Done]:
    """The body runs while the fault lasts; afterwards it is over, and was neither skipped nor too short."""
    nemesis = Nemesis(lab, [Fault(0, kind, 0, seconds, strength)], [SABOTEUR])
    doing = asyncio.create_task(nemesis.run())
    try:
        await eventually(lambda: nemesis.done and nemesis.done[0].victim, message="it has begun")
        yield nemesis.done[0]
        assert not doing.done(), "void: the trouble was over before"
    finally:
        await doing
    assert not nemesis.done[0].skipped


async def hearer(lab: Lab, tmp_path: Path) -> Callable[[], list[str]]:
    """An agent ``h`` that runs, and what it has heard so far."""
    sink = tmp_path / "heard"
    sink.touch()
    await lab.eye.agents.start("fleet:Hearer", id="h", config={"sink": str(sink)})
    return lambda: sink.read_text().split()


async def hears(lab: Lab, word: str, timeout: float = 1.0) -> bool:
    """Whether it hears the word, and its answer is heard."""
    return await lab.eye.ask("h", "hear", word, timeout=timeout) == word


async def test_a_worker_that_can_not_be_heard_still_hears(lab: Lab, tmp_path: Path) -> None:
    """What it sends is lost, and nothing of what it is sent."""
    heard = await hearer(lab, tmp_path)
    (worker,) = lab.node("n1").workers()
    async with under(lab, "worker.hold_up", 1.2) as done:
        with pytest.raises(FoundationError):
            await hears(lab, "one", timeout=0.4)
        assert "one" in heard()
        assert done.touches == [], "it is no excuse for a verdict about the node"
    await eventually(lambda: hears(lab, "two"), timeout=10, message="it is heard again")
    assert worker.is_running(), "it was too short to end it"


async def test_a_worker_that_hears_nothing_is_told_afterwards(lab: Lab, tmp_path: Path) -> None:
    """What it should receive is lost on its way, and receipted all the same."""
    heard = await hearer(lab, tmp_path)
    (worker,) = lab.node("n1").workers()
    async with under(lab, "worker.hold_down", 1.2) as done:
        assert (await lab.eye.send("h", "hear", "one", timeout=1)).sequence
        with pytest.raises(FoundationError):
            await hears(lab, "two", timeout=0.4)
        assert heard() == []
        assert done.touches == []
    await eventually(lambda: "one" in heard(), timeout=10, message="it hears of it")
    await eventually(lambda: hears(lab, "three"), timeout=10, message="all is well again")
    assert worker.is_running()


def connections(links: Sequence[Link]) -> int:
    """How many go through these."""
    return sum(link.connections for link in links)


async def test_a_worker_whose_connections_are_cut_connects_again(lab: Lab) -> None:
    """Its manager keeps its own; nobody is ended."""
    (worker,) = lab.node("n1").workers()
    mine, managers = lab.worker_links["n1"], lab.manager_links["n1"]
    async with under(lab, "worker.cut", 0.8) as done:
        await eventually(lambda: not connections(mine), timeout=0.3, message="they are cut")
        with pytest.raises(FoundationError):
            await answers(lab, 0.3)
        assert connections(managers)
        assert done.touches == []
    await eventually(lambda: answers(lab), timeout=10, message="it works again")
    assert connections(mine)
    assert worker.is_running()


async def test_a_manager_whose_connections_are_cut_connects_again(lab: Lab) -> None:
    """Its workers go on meanwhile, and nobody is declared down."""
    (worker,) = lab.node("n1").workers()
    mine = lab.manager_links["n1"]
    async with under(lab, "manager.cut", 0.8) as done:
        await eventually(lambda: not connections(mine), timeout=0.3, message="they are cut")
        assert await answers(lab, 0.5), "the worker is reached"
        assert done.touches == ["n1"]
    await eventually(lambda: connections(mine), timeout=10, message="it connects again")
    await lab.wait_up(10)
    assert await answers(lab)
    assert worker.is_running()
    assert lab.exits == []
    assert "down" not in [event.what for event in await lab.eye.events.list(limit=200)]


async def test_a_worker_that_is_parted_from_the_bus_is_replaced_and_its_node_is_not() -> None:
    """Its manager hears the bus and not the worker: it ends it, and nobody declares the node down."""
    async with Lab(seed=1, nodes=1, settings={"worker": {"hang_after_s": 1.0}}) as lab:
        await deploy(lab)
        (before,) = lab.node("n1").workers()
        doing = asyncio.create_task(do(lab, "worker.hold", 3.0))
        await eventually(lambda: not before.is_running(), timeout=10, message="it is ended")
        assert not doing.done(), "void: the trouble was over before"
        done = await doing
        assert not done.skipped
        assert done.touches == [], "it is no excuse for a verdict about the node"
        await eventually(lambda: answers(lab), timeout=15, message="its agent runs again")
        told = [event.what for event in await lab.eye.events.list(limit=200)]
        assert "down" not in told
        assert "died" in told


async def answers(lab: Lab, timeout: float = 1.0) -> bool:
    """Whether the agent answers at once."""
    await lab.eye.ask(SABOTEUR, "sabotage.hang", 0.0, timeout=timeout)
    return True


async def test_a_manager_that_is_parted_from_the_bus_leaves_its_workers_connected(
    lab: Lab,
) -> None:
    """The other way round, for less than it takes to be declared down."""
    doing = asyncio.create_task(do(lab, "manager.hold", 1.0))
    await asyncio.sleep(0.1)
    assert await answers(lab, 0.5), "the worker is reached"
    done = await doing
    assert done.touches == ["n1"]


async def test_a_worker_that_gets_no_more_memory_fails_its_handlers_or_ends_and_all_goes_on(
    lab: Lab,
) -> None:
    """Python tells the handler; libraries in native code end the process, which is replaced."""
    (worker,) = lab.node("n1").workers()
    before = worker.rlimit(psutil.RLIMIT_AS)
    doing = asyncio.create_task(do(lab, "worker.squeeze", 1.0))
    await eventually(lambda: worker.rlimit(psutil.RLIMIT_AS) != before, message="it is limited")
    with pytest.raises(FoundationError) as caught:
        await lab.eye.ask(SABOTEUR, "sabotage.leak", 64, timeout=5)
    if "MemoryError" not in str(caught.value):
        assert not worker.is_running(), str(caught.value)
    await doing
    await eventually(lambda: answers(lab), timeout=15, message="it works again")
    for process in lab.node("n1").workers():
        assert process.rlimit(psutil.RLIMIT_AS) == before


async def test_handlers_hang_and_fail_and_clients_come_and_go(lab: Lab) -> None:
    """A hanging handler keeps its agent busy; a failing one ends as a dead letter."""
    doing = asyncio.create_task(do(lab, "agent.hang", 1.0))
    began = monotonic()
    await asyncio.sleep(0.1)
    await lab.eye.ask(SABOTEUR, "sabotage.hang", 0.0)
    assert monotonic() - began >= 1.0, "it waited its turn"
    await doing
    assert not (await do(lab, "agent.raise", 0.0)).skipped

    async def buried() -> bool:
        letters = [item.letter.signal or {} for item in await lab.eye.dead.list()]
        return [letter.get("type") for letter in letters] == ["sabotage.raise"]

    await eventually(buried, timeout=15, message="it is given up")
    done = await do(lab, "client.churn", 1.0)
    assert not done.skipped
    assert int(done.victim.split()[0]) > 5


async def test_the_clocks_of_a_manager_and_its_worker_are_parted_and_set_right(lab: Lab) -> None:
    """By three quarters of an hour, in opposite directions."""
    await lab.eye.agents.start("fleet:Recorder", id="r")
    doing = asyncio.create_task(do(lab, "clock.split", 60.0, 0.9))
    apart = 0.4 * 7200

    async def ahead() -> float:
        return float(await lab.eye.ask("r", "clock", timeout=1)) - utc_now().timestamp()

    async def is_behind() -> bool:
        return abs(await ahead() + apart) < 60

    await eventually(is_behind, message="the worker is behind")

    def told() -> list[str]:
        lines = lab.node("n1").log.read_text().splitlines()
        return [line for line in lines if "worker died" in line]

    async def is_ahead() -> bool:
        """As what it writes down shows; a process sees its clock moved some moments later."""
        before = len(told())
        lab.node("n1").workers()[0].kill()
        (line, *_) = await eventually(lambda: told()[before:], message="it is written down")
        shown = datetime.fromisoformat(line.split()[0]).timestamp()
        return abs(shown - utc_now().timestamp() - apart) < 60

    await eventually(is_ahead, every=0.5, message="the manager is ahead")
    doing.cancel()
    await asyncio.wait([doing])

    async def is_right() -> bool:
        return abs(await ahead()) < 60

    await eventually(is_right, message="all is right again")


@pytest.mark.skipif(can_throttle() is not None, reason=can_throttle() or "")
async def test_a_brokers_disk_is_slow_and_full_and_well_again() -> None:
    """A full disk takes no signal; with room again and a restart it does."""
    async with Lab(seed=1, nodes=1, disks=True) as lab:
        await deploy(lab)
        (disk,) = lab.disks
        free = disk.free_bytes
        doing = asyncio.create_task(do(lab, "disk.full", 0.3))
        await eventually(lambda: disk.free_bytes < 2**16, message="it is full")
        done = await doing
        assert not done.skipped
        assert disk.free_bytes > free / 2
        assert (await lab.eye.send(SABOTEUR, "sabotage.hang", 0.0, timeout=10)).sequence
        assert not (await do(lab, "disk.slow", 0.3)).skipped
        assert (await lab.eye.send(SABOTEUR, "sabotage.hang", 0.0, timeout=10)).sequence


@pytest.mark.skipif(can_throttle() is not None, reason=can_throttle() or "")
async def test_a_brokers_disk_that_is_slow_holds_up_receipts() -> None:
    """Three writes a second: what takes a millisecond takes most of the trouble's time."""
    async with Lab(seed=1, nodes=1, disks=True) as lab:
        await deploy(lab)

        async def receipted_s(signals: int) -> float:
            """How long the slowest of so many takes."""
            slowest = 0.0
            for _ in range(signals):
                began = monotonic()
                await lab.eye.send(SABOTEUR, "sabotage.hang", 0.0, timeout=10)
                slowest = max(slowest, monotonic() - began)
            return slowest

        before = await receipted_s(20)
        trouble = asyncio.create_task(do(lab, "disk.slow", 1.5))
        slowest = 0.0
        while not trouble.done():
            slowest = max(slowest, await receipted_s(1))
        done = await trouble
        assert done.victim == "disk of broker 1"
        assert slowest > 0.3
        assert slowest > 3 * before

        async def is_quick() -> bool:
            return await receipted_s(20) < 0.2

        await eventually(is_quick, timeout=10, message="it is quick again")


async def test_what_the_lab_can_not_do_is_skipped_with_the_reason(lab: Lab) -> None:
    """And so it is not counted."""
    done = await do(lab, "disk.slow", 0.1)
    assert done.skipped == "the brokers have no disks of their own in this lab"
