"""`replay`: handle again what an agent has handled, in this process, and watch its state change.

It begins with a state that the agent really had (`agent/past.py`) and gives its class, as it can be
imported here and now, every signal that it has handled since: in order, each once, with the server's
time as the clock. Nothing leaves: what is emitted is dropped, a step of `ctx.once` is answered from the
record or refused, and the interpreter refuses to connect, to start programs and to write files while a
handler runs (`Guard`). Signals that took no effect are left out.

What can't be repeated is said, not guessed. Where a later state is stored the replay is compared with
it, and goes on from there if it differs; in the end it is compared with what is stored now.
"Exact" means that all of these are equal and that nothing but signals has changed the state; then each state
in between is what the agent had, if its handlers depend on nothing but state, signal and time.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

import orjson
from pydantic import Field

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.state import dump_state, load_state
from foundation_nats.api.history import Recording
from foundation_nats.bus.streams import StoredMessage
from foundation_nats.errors import ConfigError, FoundationError, HandlerError, NotFoundError
from foundation_nats.testing.harness import AgentHarness, HarnessContext
from foundation_schemas import StepStatus, StoredBase
from foundation_schemas.base import WireModel

_REFUSED = (
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
    "sqlite3.connect",
    "ctypes.dlopen",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


class ReplayOutcome(StrEnum):
    """What became of a signal in a replay."""

    APPLIED = "applied"
    VOID = "void"
    """It took no effect then, and was left out."""
    REFUSED = "refused"
    """Its handler reached outside; what it did to the state is not known."""
    FAILED = "failed"
    """Its handler raised, which it did not then."""


class ReplayStep(WireModel):
    """One signal of a replay."""

    sequence: int
    at: str
    id: str | None = None
    type: str | None = None
    source: str | None = None
    outcome: ReplayOutcome
    reason: str | None = None
    emitted: int = 0
    """How many signals it would have emitted."""
    state: dict[str, Any]
    """After it."""


class Check(WireModel):
    """A comparison with a state that is stored."""

    cursor: int
    same: bool
    differs: list[str] = Field(default_factory=list)
    """Fields of the state that are not the same."""


class Replay(WireModel):
    """What a replay has shown; the JSON of ``foundation replay AGENT -o json``."""

    agent: str
    run: str
    begins_at: int
    """The cursor of the state that it began with."""
    begins_with: dict[str, Any]
    until: int
    state: dict[str, Any]
    """After the last signal up to `until`."""
    steps: list[ReplayStep] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    """The last one is with the state that is stored now."""
    asides: int = 0
    """How often something that is no signal has changed the state meanwhile."""
    exact: bool = False
    """Nothing is missing, and everything that could be compared is equal."""
    remarks: list[str] = Field(default_factory=list)


class _OutsideError(BaseException):
    """A handler reached outside. No handler shall take it for an error of its own."""


class Guard:
    """Refuses, while it is closed, what reaches outside of this process.

    By the interpreter's audit events: extensions that do without them are not stopped, nor is what
    was opened before. One at a time in a process.
    """

    _closed: Guard | None = None
    _is_installed = False

    def __init__(self) -> None:
        self.tried: str | None = None
        """What was refused first since it was closed last."""

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Refuse within this block."""
        if not Guard._is_installed:
            sys.addaudithook(_audit)
            Guard._is_installed = True
        self.tried = None
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        Guard._closed = self
        try:
            yield
        finally:
            Guard._closed = None
            sys.dont_write_bytecode = before

    def refuse(self, what: str) -> None:
        """Note it, and end the handler.

        Raises:
            _OutsideError: always.
        """
        self.tried = self.tried or what
        raise _OutsideError(what)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    guard = Guard._closed
    if guard is None:
        return
    if event in _REFUSED:
        guard.refuse(event)
    if event == "open":
        path, mode, flags = (*arguments, None, None, None)[:3]
        writes = isinstance(mode, str) and any(sign in mode for sign in "wax+")
        if (writes or (isinstance(flags, int) and flags & _WRITES)) and path != os.devnull:
            guard.refuse(f"open {path!r} to write")


class _Context(HarnessContext):
    """Without steps, but for those whose result is known."""

    __slots__ = ()
    guard: ClassVar[Guard | None] = None

    async def once(self, key: str, function: Any, *args: Any, **options: Any) -> Any:
        cause = "" if options.get("scope") == "agent" else self._step_cause
        known = [
            step
            for step in self._steps_home.steps.find(key, None)
            if step.cause == cause and step.status is StepStatus.DONE
        ]
        if not known and self.guard is not None:
            self.guard.refuse(f"the step {key!r}, whose result is not kept any more")
        return await super().once(key, function, *args, **options)


class _Replayer(AgentHarness[Agent]):
    """A harness that is fed by hand, and does nothing by itself."""

    async def _settle(self) -> None:
        """What it tells itself comes from the mailbox, as it did then."""

    def put(self, state: dict[str, Any], version: int) -> bytes:
        """Give it this state, and nothing of what it has emitted."""
        agent = self.agent
        agent.state = load_state(self._cls.State, state, version=version)
        self._stored.state = dump_state(agent.state)
        self._stored.timers.clear()
        self.emitted.clear()
        return self._stored.state

    async def handle(self, message: StoredMessage, body: dict[str, Any]) -> None:
        """Give it one signal.

        Raises:
            FoundationError: its handler raised, or would not have been called.
        """
        self.now = datetime.fromisoformat(message.time)
        self.emitted.clear()
        await self._handle(
            self.agent,
            body["type"],
            body.get("data"),
            body["id"],
            body["source"],
            sequence=message.sequence,
            extra={key: body.get(key) for key in ("time", "cause", "traceparent", "deadline")},
        )


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields that are not the same in both."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


async def replay(
    recording: Recording,
    cls: type[Agent],
    *,
    until: int | None = None,
    allow_outside: bool = False,
) -> Replay:
    """Handle again what *recording* holds, with *cls*; all of it, whatever *until* is.

    Args:
        until: whose state is wanted: that after the last signal up to this sequence; None: the last one.
        allow_outside: let handlers reach outside (`Guard`) and do their steps again, for real.

    Raises:
        NotFoundError: *until* lies before the first state that is kept, or after what was handled.
        StateInvalidError: a stored state does not fit the class as it is here.
        HandlerError: its `on_start` raised, or reached outside.
        ConfigError: this event loop's connections can't be refused.
    """
    if not allow_outside and type(asyncio.get_running_loop()).__module__.startswith("uvloop"):
        raise ConfigError(
            "A replay that refuses what reaches outside can't run on uvloop, which connects without "
            "the interpreter's knowledge.",
            hint="Run it on asyncio's own loop, or with allow_outside.",
        )
    first, *later = recording.bases
    end = recording.record.cursor
    wanted = end if until is None else until
    if not first.cursor <= wanted <= end:
        raise NotFoundError(
            f"{recording.agent} can be replayed from #{first.cursor} to #{end}, not to #{wanted}.",
            hint="`foundation history` lists what it has handled.",
            agent=recording.agent,
        )
    guard = None if allow_outside else Guard()
    harness = _Replayer(cls, id=recording.agent, config=recording.config or None)
    harness._context_kind = type("_Guarded", (_Context,), {"__slots__": (), "guard": guard})
    harness._stored.steps = orjson.dumps(
        [step.model_dump(mode="json") for step in recording.record.steps]
    )
    await _started(harness, guard)
    try:
        return await _run(recording, harness, guard, first, later, wanted)
    finally:
        harness._offload.close()


async def _started(harness: _Replayer, guard: Guard | None) -> None:
    """Run `on_start`, which may make what handlers use.

    Raises:
        HandlerError
    """
    try:
        with _closed(guard):
            await harness.start()
    except _OutsideError as error:
        raise HandlerError(
            f"on_start reaches outside ({error}), which a replay refuses.",
            hint="Allow it with --allow-outside, if it may be done again.",
        ) from None


@contextmanager
def _closed(guard: Guard | None) -> Iterator[None]:
    if guard is None:
        yield
        return
    with guard.closed():
        yield


async def _run(
    recording: Recording,
    harness: _Replayer,
    guard: Guard | None,
    first: StoredBase,
    later: list[StoredBase],
    until: int,
) -> Replay:
    record = recording.record
    void = {*recording.dead, *(record.past.void if record.past else ())}
    begins = orjson.loads(harness.put(first.state, first.schema_version))
    wanted, steps, checks = begins, [], []
    waiting = list(later)

    def compare(stored: dict[str, Any], version: int, cursor: int) -> None:
        reached = orjson.loads(harness._stored.state)
        known = orjson.loads(harness.put(stored, version))
        differs = differing(reached, known)
        checks.append(Check(cursor=cursor, same=not differs, differs=differs))

    for message in recording.messages:
        while waiting and waiting[0].cursor < message.sequence:
            base = waiting.pop(0)
            compare(base.state, base.schema_version, base.cursor)
        step = await _step(harness, guard, message, is_void=message.sequence in void)
        steps.append(step)
        if message.sequence <= until:
            wanted = step.state
    for base in waiting:
        compare(base.state, base.schema_version, base.cursor)
    compare(record.state or {}, record.schema_version, record.cursor)
    asides = (record.past.asides if record.past else 0) - first.asides
    bad = [step for step in steps if step.outcome in (ReplayOutcome.REFUSED, ReplayOutcome.FAILED)]
    return Replay(
        agent=recording.agent,
        run=recording.run,
        begins_at=first.cursor,
        begins_with=begins,
        until=until,
        state=wanted,
        steps=steps,
        checks=checks,
        asides=asides,
        exact=not (asides or bad or any(not check.same for check in checks)),
        remarks=_remarks(asides, bad, checks),
    )


async def _step(
    harness: _Replayer, guard: Guard | None, message: StoredMessage, *, is_void: bool
) -> ReplayStep:
    try:
        body = orjson.loads(message.data)
        facts = {key: str(body[key]) for key in ("id", "type", "source")}
    except (ValueError, KeyError, TypeError):
        body, facts, is_void = {}, {}, True
    outcome, reason = ReplayOutcome.VOID, None
    before = harness._stored.state
    if not is_void:
        outcome = ReplayOutcome.APPLIED
        try:
            with _closed(guard):
                await harness.handle(message, body)
        except _OutsideError as error:
            outcome, reason = ReplayOutcome.REFUSED, str(error)
        except FoundationError as error:
            outcome, reason = ReplayOutcome.FAILED, str(error)
        if guard is not None and guard.tried is not None:
            # Also where the handler took the refusal for an error that it knows what to do about.
            outcome, reason = ReplayOutcome.REFUSED, guard.tried
            harness.put(orjson.loads(before), harness._cls.State.version)
    return ReplayStep(
        sequence=message.sequence,
        at=message.time,
        outcome=outcome,
        reason=reason,
        emitted=len(harness.emitted) if outcome is ReplayOutcome.APPLIED else 0,
        state=orjson.loads(harness._stored.state),
        **facts,
    )


def _remarks(asides: int, bad: list[ReplayStep], checks: list[Check]) -> list[str]:
    found = []
    if asides:
        found.append(
            f"{asides} times something that is no signal in the mailbox has changed the state "
            "(a question, a hook, a new version of it); states in between lack that."
        )
    for outcome, text in (
        (ReplayOutcome.REFUSED, "reached outside and were not handled again"),
        (ReplayOutcome.FAILED, "raised now, which they did not then"),
    ):
        some = [step for step in bad if step.outcome is outcome]
        if some:
            found.append(f"{len(some)} signals {text}, the first is #{some[0].sequence}.")
    for check in checks[:-1]:
        if not check.same:
            found.append(
                f"At #{check.cursor} the stored state differs in {', '.join(check.differs)}; "
                "the replay went on from the stored one."
            )
    last = checks[-1]
    if not last.same:
        found.append(f"The state that is stored now differs in {', '.join(last.differs)}.")
    if found and not asides and not bad:
        found.append(
            "The code has changed since, or handlers depend on more than state, signal and time."
        )
    return found


__all__ = ["Check", "Guard", "Replay", "ReplayOutcome", "ReplayStep", "differing", "replay"]
