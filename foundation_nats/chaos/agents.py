"""The agents of the workloads: they write down what happened to them, for a checker to read.

They are part of the installed package, so that a campaign runs on any cluster
whose nodes have it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import time
from secrets import token_hex
from typing import Any, cast

import orjson
from pydantic import BaseModel, Field

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.handling import on
from foundation_nats.agent.kin import ChildExited, ChildStarted, Supervision
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.state import State as Stored
from foundation_nats.base.clock import monotonic
from foundation_schemas import RecoveredFrom


class Entry(BaseModel):
    """One thing to write down."""

    key: str


class Ledger(Agent):
    """Appends every key that it is sent, and tells its mirror because of it."""

    class State(Stored):
        """Every key applied, in order."""

        applied: list[str] = Field(default_factory=list)

    @on("chaos.append")
    async def append(self, signal: Signal[Entry]) -> None:
        """Write it down, and pass it on where there is a mirror."""
        self.state.applied.append(signal.data.key)
        pause = self.config.get("pause_s")
        if pause:
            await asyncio.sleep(pause)
        mirror = self.config.get("mirror")
        if mirror:
            self.emit("chaos.append", {"key": signal.data.key}, to=mirror.format(self.id))

    @on("chaos.length")
    async def length(self, signal: Signal[Any]) -> int:
        """How many keys."""
        return len(self.state.applied)


class Numbered(BaseModel):
    """The sender's next number."""

    sender: str
    number: int


class Tally(Agent):
    """Counts what each sender numbers, and sees gaps and repetitions without keeping a list."""

    class State(Stored):
        """Where each sender stands, and what was wrong."""

        last: dict[str, int] = Field(default_factory=dict)
        applied: int = 0
        repeated: int = 0
        skipped: int = 0

    @on("tally.count")
    async def count(self, signal: Signal[Numbered]) -> None:
        """Count it, and tell the mirror where there is one."""
        sender, number = signal.data.sender, signal.data.number
        last = self.state.last.get(sender, 0)
        self.state.applied += 1
        self.state.skipped += max(0, number - last - 1)
        self.state.repeated += number <= last
        self.state.last[sender] = max(last, number)
        mirror = self.config.get("mirror")
        if mirror:
            self.emit(
                "tally.count", {"sender": sender, "number": number}, to=mirror.format(self.id)
            )


class Transfer(BaseModel):
    """Move *amount* to *to*; *key* names the order."""

    key: str
    to: str
    amount: int


class Deposit(BaseModel):
    """What arrives of a transfer."""

    origin: str
    amount: int


class Account(Agent):
    """A bank account: what it sends leaves by an emitted signal."""

    class State(Stored):
        """Balance, and per peer what was sent and received."""

        balance: int = 0
        opening: int = 0
        sent: dict[str, int] = Field(default_factory=dict)
        received: dict[str, int] = Field(default_factory=dict)
        applied: list[str] = Field(default_factory=list)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Open it once."""
        if not self.state.opening:
            self.state.opening = self.state.balance = int(self.config.get("opening", 1000))

    @on("bank.transfer")
    async def transfer(self, signal: Signal[Transfer]) -> None:
        """Take from the balance, and send."""
        order = signal.data
        self.state.applied.append(order.key)
        self.state.balance -= order.amount
        self.state.sent[order.to] = self.state.sent.get(order.to, 0) + order.amount
        self.emit("bank.deposit", {"origin": self.id, "amount": order.amount}, to=order.to)

    @on("bank.deposit")
    async def deposit(self, signal: Signal[Deposit]) -> None:
        """Add to the balance."""
        paid = signal.data
        self.state.balance += paid.amount
        self.state.received[paid.origin] = self.state.received.get(paid.origin, 0) + paid.amount


class Swap(BaseModel):
    """Replace *expected* by *new*."""

    expected: int | None
    new: int


class Register(Agent):
    """One value: read, write, compare and set, by asks.

    Each answer says which activation gave it, and when it was at work.
    """

    class State(Stored):
        """The value; None at first."""

        value: int | None = None

    def _answer(self, value: Any) -> dict[str, Any]:
        return {
            "value": value,
            "epoch": self.ctx.epoch,
            "at_ns": int(monotonic() * 1e9),
            "host": socket.gethostname(),
        }

    @on("register.read")
    async def read(self, signal: Signal[Any]) -> dict[str, Any]:
        """The value."""
        return self._answer(self.state.value)

    @on("register.write")
    async def write(self, signal: Signal[int]) -> dict[str, Any]:
        """Replace the value."""
        self.state.value = signal.data
        return self._answer(None)

    @on("register.cas")
    async def cas(self, signal: Signal[Swap]) -> dict[str, Any]:
        """Replace the value if it is as expected; whether it was."""
        if self.state.value != signal.data.expected:
            return self._answer(False)
        self.state.value = signal.data.new
        return self._answer(True)


class DrowsyRegister(Register):
    """A register that sleeps whenever nobody has asked for a moment."""

    hibernate_after = 0.3

    class State(Stored):
        """The value, and how often it woke up."""

        value: int | None = None
        woken: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Count awakenings."""
        if recovered_from is not None and recovered_from.reason == "hibernated":
            self.state.woken += 1


class Ring(BaseModel):
    """What rings an alarm, and how long after it is set."""

    key: str
    after: float


class Alarm(Agent):
    """Is rung by timers that clients set, and by those that it sets itself."""

    class State(Stored):
        """What was set here, and how far the wall clock was ahead of the monotonic one then; what
        rang, and when on this machine's monotonic clock; the ids of ticks."""

        set: list[str] = Field(default_factory=list)
        clocks: dict[str, float] = Field(default_factory=dict)
        rung: list[tuple[str, int]] = Field(default_factory=list)
        ticks: list[str] = Field(default_factory=list)

    @on("alarm.set")
    async def set_timer(self, signal: Signal[Ring]) -> None:
        """Set a timer, in the same commit as the note of it."""
        key, after = signal.data.key, signal.data.after
        self.state.set.append(key)
        self.state.clocks[key] = self.ctx.now().timestamp() - monotonic()
        name = key.replace(".", "-")
        self.ctx.schedule("alarm.ring", {"key": key, "after": after}, after=after, name=name)

    @on("alarm.ring")
    async def ring(self, signal: Signal[Ring]) -> None:
        """Note it."""
        self.state.rung.append((signal.data.key, int(monotonic() * 1e9)))

    @on("alarm.tick")
    async def tick(self, signal: Signal[Any]) -> None:
        """Note which firing it was."""
        self.state.ticks.append(signal.id)


class Payer(Agent):
    """Does two things outside for each order, the second only after the first."""

    class State(Stored):
        """The orders carried out, and which payment each believes in."""

        applied: list[tuple[str, str]] = Field(default_factory=list)

    @on("steps.order")
    async def order(self, signal: Signal[Entry]) -> None:
        """Pay, mail, and note it."""
        key, sink, epoch = signal.data.key, self.config["sink"], self.ctx.epoch
        token = await self.ctx.once("pay", _outside, sink, key, "pay", epoch)
        await self.ctx.once("mail", _outside, sink, key, "mail", epoch)
        self.state.applied.append((key, token))


async def _outside(sink: str, key: str, step: str, epoch: int) -> str:
    """Append one line to the file: what reaches the world outside stays there."""
    token = token_hex(8)
    line = orjson.dumps({"key": key, "step": step, "token": token, "epoch": epoch}) + b"\n"
    file = os.open(sink, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)
    return token


class Token(BaseModel):
    """One token on its way round a ring."""

    key: str
    hop: int
    last: int
    size: int


class Station(Agent):
    """Notes every token, and passes it on to the next of the ring."""

    class State(Stored):
        """Every (token, hop) that passed, in order."""

        applied: list[str] = Field(default_factory=list)

    @on("ring.token")
    async def token(self, signal: Signal[Token]) -> None:
        """Note it, and pass it on until it has gone its way."""
        token = signal.data
        self.state.applied.append(f"{token.key}/{token.hop}")
        if token.hop < token.last:
            name, _, number = self.id.rpartition("-")
            following = (int(number) + 1) % token.size
            data = {**token.model_dump(), "hop": token.hop + 1}
            self.emit("ring.token", data, to=f"{name}-{following}")


class Item(BaseModel):
    """One item on its way through a pipeline."""

    key: str
    worth: int


class Stage(Agent):
    """Passes every item on to the next stage; the last one keeps it."""

    class State(Stored):
        """Every key that passed, in order, and the sum of what they are worth."""

        applied: list[str] = Field(default_factory=list)
        worth: int = 0

    @on("pipeline.item")
    async def item(self, signal: Signal[Item]) -> None:
        """Note it, and pass it on, worth one more."""
        self.state.applied.append(signal.data.key)
        self.state.worth += signal.data.worth
        following = self.config.get("next")
        if following:
            number = self.id.rpartition("-")[2]
            self.emit(
                "pipeline.item",
                {"key": signal.data.key, "worth": signal.data.worth + 1},
                to=f"{following}-{number}",
            )


class Child(Agent):
    """Ends when it is told to, and writes down its lives."""

    class State(Stored):
        """``start`` for each activation, and the keys of what it was told."""

        log: list[str] = Field(default_factory=list)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Write it down, or fail."""
        if self.config.get("sick"):
            raise RuntimeError("sick")
        self.state.log.append("start")

    @on("child.done")
    async def done(self, signal: Signal[Entry]) -> None:
        """It has nothing more to do."""
        self.state.log.append(signal.data.key)
        self.ctx.stop("done")

    @on("child.who")
    async def who(self, signal: Signal[Any]) -> dict[str, Any]:
        """Which activation answers."""
        return {
            "epoch": self.ctx.epoch,
            "at_ns": int(monotonic() * 1e9),
            "host": socket.gethostname(),
        }


class Head(Child):
    """A child that always has a child of its own."""

    class State(Child.State):
        """Also the ends of that: order and status."""

        ends: list[tuple[int, str]] = Field(default_factory=list)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Have it."""
        await super().on_start(recovered_from)
        self.ctx.spawn(Child, tag=LEAF, critical=True)

    @on(ChildExited)
    async def has_ended(self, signal: Signal[ChildExited]) -> None:
        """Have it again."""
        self.state.ends.append((signal.data.order, signal.data.status))
        self.ctx.spawn(Child, tag=LEAF, critical=True)


LEAF = "leaf"
"""What a `Head` calls its child."""
CHILDREN: dict[str, dict[str, Any]] = {
    "keen": {"run": Child, "restart": "permanent"},
    "calm": {"run": Child, "restart": "transient"},
    "sick": {
        "run": Child,
        "config": {"sick": True},
        "restart_limit": {"max_restarts": 1, "within_s": 60},
    },
    "head": {"run": Head, "restart": "transient"},
}
"""The children that a `Guardian` may have, by tag."""


class Wanted(BaseModel):
    """Which child to have, or to have no more."""

    key: str
    tag: str


class Guardian(Agent):
    """Has children as it is told, and writes down what it did and what it heard of them, in order."""

    # What is killed comes back, however often; only the sick one has a limit of its own.
    supervision = Supervision(max_restarts=1000)

    class State(Stored):
        """Keys applied; and (``have`` or ``end``, tag, whether it was there), (``started``, tag, order),
        (``exited``, tag, order, status, reason, whether it is there again)."""

        applied: list[str] = Field(default_factory=list)
        log: list[tuple[Any, ...]] = Field(default_factory=list)

    @on("family.have")
    async def have(self, signal: Signal[Wanted]) -> None:
        """Have a child."""
        tag = signal.data.tag
        self.state.applied.append(signal.data.key)
        self.state.log.append(("have", tag, tag in self.ctx.children()))
        self.ctx.spawn(tag=tag, critical=True, **CHILDREN[tag])

    @on("family.end")
    async def end(self, signal: Signal[Wanted]) -> None:
        """Have it no more."""
        tag = signal.data.tag
        self.state.applied.append(signal.data.key)
        self.state.log.append(("end", tag, self.ctx.stop_child(tag)))

    @on(ChildStarted)
    async def has_started(self, signal: Signal[ChildStarted]) -> None:
        """Note it."""
        self.state.log.append(("started", signal.data.tag, signal.data.order))

    @on(ChildExited)
    async def has_ended(self, signal: Signal[ChildExited]) -> None:
        """Note it."""
        gone = signal.data
        is_there = gone.tag in self.ctx.children()
        self.state.log.append(("exited", gone.tag, gone.order, gone.status, gone.reason, is_there))


class Guarded(Agent):
    """A resource that looks at fencing tokens."""

    class State(Stored):
        """The highest token seen, and whose writes were accepted under which."""

        token: int = 0
        accepted: list[tuple[str, int]] = Field(default_factory=list)

    @on("guarded.write")
    async def write(self, signal: Signal[tuple[str, int]]) -> bool:
        """Accept a write by (holder, token) unless a later token was seen."""
        holder, token = signal.data
        if token < self.state.token:
            return False
        self.state.token = token
        self.state.accepted.append((holder, token))
        return True


class Saboteur(Agent):
    """Does to its worker process what agents should not do."""

    class State(Stored):
        """How often it was told to."""

        count: int = 0

    @on("sabotage.exit")
    async def exit(self, signal: Signal[Any]) -> None:
        """End the process."""
        os._exit(3)

    @on("sabotage.crash")
    async def crash(self, signal: Signal[Any]) -> None:
        """Crash in native code."""
        ctypes.string_at(0)

    @on("sabotage.block")
    async def block(self, signal: Signal[float]) -> None:
        """Hold the event loop, for so many seconds."""
        time.sleep(signal.data)

    @on("sabotage.hang")
    async def hang(self, signal: Signal[float]) -> None:
        """Wait for so many seconds without holding the loop."""
        await asyncio.sleep(signal.data)

    @on("sabotage.leak")
    async def leak(self, signal: Signal[int]) -> None:
        """Take so many megabytes for good."""
        _LEAKED.append(bytearray(signal.data * 1024 * 1024))

    @on("sabotage.raise")
    async def fail(self, signal: Signal[Any]) -> None:
        """Fail as handlers do."""
        raise RuntimeError("sabotaged")


_LEAKED: list[bytearray] = []


class Idler(Agent):
    """Is there, and needs resources: for churn."""

    class State(Stored):
        """Nothing to keep but how often it was started."""

        starts: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Count it."""
        self.state.starts += 1

    @on("idler.ping")
    async def ping(self, signal: Signal[Any]) -> int:
        """How often it was started."""
        return cast("int", self.state.starts)
