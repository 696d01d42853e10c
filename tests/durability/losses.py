"""Publish at full speed, let a fault strike, and count which acknowledged messages are gone.

One run: servers on disks of their own, one file stream, messages numbered 1, 2, 3 …;
after *load_s* the fault strikes (`Fault`), and the servers are started again on what the
disks hold. What had been acknowledged before and is not in the stream any more is lost.

The stream itself was written back before the load began (`MortalDisk.settle`), as if it had
been made minutes ago. Runs are far shorter than the kernel's own write-back (30 s): what the
server does not sync, it loses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import PubAck, StreamReader, api, append, append_nowait
from foundation_nats.config import BusConfig
from foundation_nats.errors import FoundationError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.brokers import free_port
from foundation_nats.testing.disks import MortalDisk

STREAM = "LEDGER"
SUBJECT = "ledger"
_DISK_MB = 384
_SMALL_DISK_MB = 96
_PAGE = 1000
_PAYLOAD_BYTES = 200
_IN_FLIGHT = 512
"""Enough to keep a server busy; more only wait longer where every message is synced."""
_STUCK_AFTER_S = 15.0
"""Elections after a start take 4 to 9 s."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How durable an acknowledgement is meant to be."""

    replicas: int
    sync_interval: str

    @property
    def name(self) -> str:
        """As in the documents."""
        return f"R{self.replicas}, sync {self.sync_interval}"


MODES = [Mode(replicas, interval) for replicas in (1, 3) for interval in ("2m", "100ms", "always")]


class Fault(StrEnum):
    """What strikes under load."""

    KILL = "kill -9"
    """Every server process is killed; the machines go on."""
    ONE = "one machine's power"
    """The machine of the stream's leader loses its power; it comes back and joins the others."""
    ALL = "all machines' power"
    """Every machine loses its power in the same moment."""
    FULL = "disk full"
    """Every disk fills up; it is freed, and the servers are started again."""


def faults_of(mode: Mode) -> list[Fault]:
    """What can happen to so many servers; one server's power is all the power there is."""
    return [fault for fault in Fault if mode.replicas > 1 or fault is not Fault.ONE]


class Outcome(StrEnum):
    """What became of the stream."""

    USABLE = "usable"
    GONE = "gone"
    """The servers know no such stream any more."""
    STUCK = "stuck"
    """It is listed, but has no leader and takes nothing, and that does not change by itself."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What one fault cost."""

    mode: str
    fault: str
    acknowledged: int
    """Messages acknowledged before the cut."""
    rate: int
    """Of those, per second."""
    lost: int
    lost_s: float
    """From the acknowledgement of the newest survivor to the last one before the cut."""
    survived_unacknowledged: int
    """Stored although nobody had been told."""
    holes: int
    """Numbers missing below the newest survivor: must be 0."""
    outcome: Outcome
    ready_s: float
    """From the restart until the stream took a message again."""


async def measure(mode: Mode, fault: Fault = Fault.ALL, *, load_s: float = 2.0) -> Loss:
    """One run.

    Raises:
        AssertionError: the servers don't come back, or what they hold contradicts itself.
    """
    async with AsyncExitStack() as stack:
        size = _SMALL_DISK_MB if fault is Fault.FULL else _DISK_MB
        disks = [stack.enter_context(MortalDisk(size)) for _ in range(mode.replicas)]
        servers = servers_on(mode, disks)
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        acked, struck = await _load(mode, fault, servers, disks, load_s)
        for index in struck:
            if fault in (Fault.ONE, Fault.ALL):
                disks[index].power_loss()
            elif fault is Fault.FULL:
                disks[index].free()
        restarted = time.monotonic()
        await asyncio.gather(*(servers[index].restart() for index in struck))
        async with AsyncExitStack() as connection:
            bus = await _connected(connection, servers)
            outcome = await _outcome(bus)
            ready_s = time.monotonic() - restarted
            numbers = await _survivors(bus) if outcome is Outcome.USABLE else []
    return _judge(mode, fault, acked, numbers, load_s, outcome, ready_s)


def servers_on(mode: Mode, disks: list[MortalDisk]) -> list[TestServer]:
    """One server for each disk, not started; several are one NATS cluster."""
    ports = [free_port() for _ in disks]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return [
        TestServer(
            EmbeddedConfig(
                store=disk.path,
                sync_interval=mode.sync_interval,
                extra=f'cluster {{ name: C, listen: "127.0.0.1:{port}", routes: [{routes}] }}'
                if mode.replicas > 1
                else "",
            )
        )
        for disk, port in zip(disks, ports, strict=True)
    ]


async def _connected(stack: AsyncExitStack, servers: list[TestServer]) -> Bus:
    bus = await Bus.connect(
        BusConfig(servers=tuple(s.url for s in servers), in_flight_max=_IN_FLIGHT), "durability"
    )
    stack.push_async_callback(bus.close)
    return bus


async def _load(
    mode: Mode,
    fault: Fault,
    servers: list[TestServer],
    disks: list[MortalDisk],
    load_s: float,
) -> tuple[dict[int, float], list[int]]:
    """Number to time of its acknowledgement, as known when the fault struck; and whom it struck."""
    acked: dict[int, float] = {}
    async with AsyncExitStack() as stack:
        bus = await _connected(stack, servers)
        settings: dict[str, Any] = {
            "name": STREAM,
            "subjects": [SUBJECT],
            "storage": "file",
            "num_replicas": mode.replicas,
            "allow_direct": True,
        }

        async def created() -> bool:
            await api(bus, "STREAM.CREATE", STREAM, settings)
            return True

        async def writable() -> bool:
            await append(bus, SUBJECT, _payload(0), timeout=1.0)
            return True

        # Three servers elect a meta leader first, and then one of the stream.
        await eventually(created, timeout=20, message="the stream is made")
        await eventually(writable, timeout=20, message="the stream takes messages")
        await api(bus, "STREAM.PURGE", STREAM)
        for disk in disks:
            disk.settle()

        def on_ack(number: int, ack: PubAck | FoundationError) -> None:
            if isinstance(ack, PubAck):
                acked[number] = time.monotonic()

        struck = [*range(len(servers))]
        if fault is Fault.ONE:
            leader = (await api(bus, "STREAM.INFO", STREAM))["cluster"]["leader"]
            struck = [index for index in struck if servers[index].name == leader]
        deadline = time.monotonic() + load_s
        filling = None
        if fault is Fault.FULL:
            filling = asyncio.create_task(_fill(disks, load_s / 2))
        number = 0
        while time.monotonic() < deadline:
            if not bus.has_room:
                # A full disk may take no more at all.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bus.wait_room(), max(0.0, deadline - time.monotonic()))
                continue
            for _ in range(32):
                number += 1
                append_nowait(bus, SUBJECT, _payload(number), partial(on_ack, number))
            await asyncio.sleep(0)
        # No turn of the loop between these lines: what the client knows now, it knew before.
        known = dict(acked)
        for index in struck:
            os.kill(servers[index].pid, signal.SIGKILL)
        for index in struck:
            if fault in (Fault.ONE, Fault.ALL):
                disks[index].cut()
        for index in struck:
            servers[index].kill()
        if filling is not None:
            await filling
    return known, struck


async def _fill(disks: list[MortalDisk], after_s: float) -> None:
    await asyncio.sleep(after_s)
    for disk in disks:
        await asyncio.to_thread(disk.fill)


def _payload(number: int) -> bytes:
    return str(number).encode().ljust(_PAYLOAD_BYTES)


async def _outcome(bus: Bus) -> Outcome:
    """Wait until the stream takes a message, or for good."""
    names: list[str] = []

    async def listed() -> bool:
        names[:] = (await api(bus, "STREAM.NAMES")).get("streams") or []
        return True

    async def writable() -> bool:
        await append(bus, SUBJECT, _payload(0), timeout=1.0)
        return True

    await eventually(listed, timeout=20, message="JetStream is back")
    if STREAM not in names:
        return Outcome.GONE
    try:
        await eventually(writable, timeout=_STUCK_AFTER_S, message="the stream takes messages")
    except AssertionError:
        return Outcome.STUCK
    return Outcome.USABLE


async def _survivors(bus: Bus) -> list[int]:
    """The numbers in the stream, in its order.

    Raises:
        AssertionError: there is a gap, or a message is damaged.
    """
    reader = StreamReader(bus, STREAM)
    state = (await reader.info())["state"]
    assert state["messages"] == state["last_seq"] - state["first_seq"] + 1, f"gaps: {state}"
    assert not state.get("num_deleted"), f"gaps: {state}"
    return await _read(reader)


async def _read(reader: StreamReader) -> list[int]:
    numbers: list[int] = []
    start = 1
    while True:
        messages, pending = await reader.page(SUBJECT, start, batch=_PAGE)
        sequences = [message.sequence for message in messages]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
        for message in messages:
            assert len(message.data) == _PAYLOAD_BYTES, f"{message.sequence} is damaged"
            numbers.append(int(message.data))
        if not pending:
            return [number for number in numbers if number]  # 0 is not of the load
        start = sequences[-1] + 1


def _judge(
    mode: Mode,
    fault: Fault,
    acked: dict[int, float],
    numbers: list[int],
    load_s: float,
    outcome: Outcome,
    ready_s: float,
) -> Loss:
    kept = set(numbers)
    assert len(kept) == len(numbers), "a message is stored twice"
    assert numbers == sorted(numbers), "messages changed places"
    survivors = [when for number, when in acked.items() if number in kept]
    last = max(acked.values(), default=0.0)
    newest = max(survivors, default=last - load_s)
    return Loss(
        mode=mode.name,
        fault=fault,
        acknowledged=len(acked),
        rate=round(len(acked) / load_s),
        lost=len(acked.keys() - kept),
        lost_s=round(last - newest, 3),
        survived_unacknowledged=len(kept - acked.keys()),
        holes=len(set(range(1, max(kept, default=0) + 1)) - kept),
        outcome=outcome,
        ready_s=round(ready_s, 2),
    )


async def table(modes: list[Mode], *, runs: int = 2, load_s: float = 1.5) -> list[dict[str, Any]]:
    """Every mode and fault, the run that lost most of each, with all its runs' losses."""
    rows = []
    for mode in modes:
        for fault in faults_of(mode):
            losses = [await measure(mode, fault, load_s=load_s) for _ in range(runs)]
            worst = max(losses, key=lambda loss: (loss.lost, loss.acknowledged))
            rows.append(
                {
                    **asdict(worst),
                    "all_lost": [loss.lost for loss in losses],
                    "outcomes": [loss.outcome for loss in losses],
                }
            )
            print(f"{mode.name}, {fault}: {rows[-1]['all_lost']} lost", file=sys.stderr)
    return rows
