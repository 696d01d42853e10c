"""`Steps`: the ledger behind `ctx.once`, so that a step known to be done is never done again.

A handler that calls a model, mails or refunds is handled again when it raises, and when its
worker dies. What it did outside can't be rolled back. So each such step is written down in the
agent's record: `pending` before it is begun, `done` with its result after. A handler that is
repeated gets the stored result of what is done.

Guaranteed, of a durable agent: a step whose `done` is stored is never begun again for its
cause, by no retry, failover, move or replay of the dead letter; and nobody begins a step whose
activation has been replaced before `pending` was stored.

Not guaranteed: that a step is done once. Between its effect and the storing of `done` a crash
leaves it in doubt: nobody but the other side can tell whether it happened. What is done then
says `Doubt`. With `rerun` the other side sees the same idempotency key again.

A step belongs to the signal in hand (its *cause*), and is forgotten when that has taken effect,
in the same commit; where the signal is given up it stays for the replay. With `scope="agent"` it
belongs to the agent, until `forget`.

The ledger is pure; `once` is the shell, and stores by the `StepHome` it is given.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import orjson
from pydantic import TypeAdapter, ValidationError

from foundation_nats.base.clock import utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import (
    ConfigError,
    NotFoundError,
    StepInDoubtError,
    StepNotDoneError,
    StepTooLargeError,
)
from foundation_schemas import StepRecord, StepStatus

STEPS_MAX = 1000
"""Steps in one agent's ledger; the oldest of signals that were given up make room."""
KEY_LENGTH_MAX = 200
NOTE_LENGTH_MAX = 200
_REPLAYED = re.compile(r"(\.replay\d+)+$")


class Doubt(StrEnum):
    """What to do about a step that was begun, and of which nobody knows whether it was done."""

    RERUN = "rerun"
    """Begin it again, with the same idempotency key."""
    VERIFY = "verify"
    """Ask *verify*, which returns the result, or raises `StepNotDoneError`."""
    FAIL = "fail"
    """Raise `StepInDoubtError`: a person decides (`foundation steps resolve`)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of the ledger."""

    cause: str
    """Of which signal; empty: of the agent itself."""
    key: str
    status: StepStatus
    at: str
    """Since when, UTC."""
    attempts: int
    result: bytes | None = None
    """JSON; None while it is pending, and where it was too large to be kept."""
    note: str = ""
    """What it raised last, while it is pending."""

    def encoded(self) -> dict[str, Any]:
        """As it is stored."""
        body: dict[str, Any] = {
            "cause": self.cause,
            "key": self.key,
            "status": self.status,
            "at": self.at,
            "attempts": self.attempts,
        }
        if self.result is not None:
            body["result"] = orjson.Fragment(self.result)
        elif self.status is StepStatus.DONE:
            body["lost"] = True
        if self.note:
            body["note"] = self.note
        return body


class StepLedger:
    """The steps of one agent, oldest first."""

    __slots__ = ("_bytes", "_steps", "bytes_max")

    def __init__(self, stored: Iterable[StepRecord] = (), *, bytes_max: int = 131_072) -> None:
        self._steps: dict[tuple[str, str], Step] = {}
        self._bytes = 0
        self.bytes_max = bytes_max
        for item in stored:
            lost = item.lost or item.status is StepStatus.PENDING
            self._put(
                Step(
                    item.cause,
                    item.key,
                    item.status,
                    item.at,
                    item.attempts,
                    None if lost else orjson.dumps(item.result),
                    item.note,
                )
            )

    def __len__(self) -> int:
        return len(self._steps)

    def get(self, cause: str, key: str) -> Step | None:
        """The step, if it was ever begun."""
        return self._steps.get((cause, key))

    def begin(self, cause: str, key: str, at: str) -> None:
        """It is about to be done, for the first time or again.

        Raises:
            StepTooLargeError: the signal in hand alone has too many.
        """
        known = self.get(cause, key)
        if known is None:
            self._make_room(cause)
        self._put(
            Step(cause, key, StepStatus.PENDING, at, 1 if known is None else known.attempts + 1)
        )

    def finish(self, cause: str, key: str, at: str, result: bytes) -> bool:
        """It is done; False: the result is too large to be kept, and only that is remembered."""
        known = replace(self._steps[cause, key], note="")
        fits = self._bytes + len(result) <= self.bytes_max
        self._put(replace(known, status=StepStatus.DONE, at=at, result=result if fits else None))
        return fits

    def raised(self, cause: str, key: str, error: Exception) -> None:
        """It has raised *error*, which tells a person something, and leaves the doubt."""
        text = f"{type(error).__name__}: {error}"[:NOTE_LENGTH_MAX]
        self._put(replace(self._steps[cause, key], note=text))

    def forget(self, cause: str, key: str) -> bool:
        """Drop one; whether there was one."""
        step = self._steps.pop((cause, key), None)
        if step is not None:
            self._bytes -= len(step.result or b"")
        return step is not None

    def settle(self, cause: str) -> bool:
        """Its signal has taken effect: drop all of its steps; whether there were any."""
        keys = [key for owner, key in self._steps if owner == cause]
        for key in keys:
            self.forget(cause, key)
        return bool(keys)

    def find(self, key: str, signal: str | None) -> list[Step]:
        """Those called *key*, of *signal* (its id) if given."""
        return [
            step
            for step in self._steps.values()
            if step.key == key and (signal is None or step.cause.partition(" ")[2] == signal)
        ]

    def encoded(self) -> list[dict[str, Any]]:
        """As it is stored in the record."""
        return [step.encoded() for step in self._steps.values()]

    def _put(self, step: Step) -> None:
        before = self._steps.get((step.cause, step.key))
        self._bytes += len(step.result or b"") - len(before.result or b"" if before else b"")
        self._steps[step.cause, step.key] = step

    def _make_room(self, cause: str) -> None:
        while len(self._steps) >= STEPS_MAX:
            old = next((item for item in self._steps if item[0] not in ("", cause)), None)
            if old is None:
                raise StepTooLargeError(
                    f"More than {STEPS_MAX:,} steps would be remembered.",
                    hint="Spread the work over several signals, or `ctx.forget` steps of the agent.",
                )
            self.forget(*old)


class StepHome(Protocol):
    """Who keeps a ledger together with the agent's state."""

    @property
    def steps(self) -> StepLedger:
        """The agent's ledger."""

    async def store_steps(self) -> None:
        """Return when the ledger is stored as it is now, and we may still act for the agent."""


class Idempotent(typing.NamedTuple):
    """What names a step to the outside."""

    agent: str
    cause: str
    key: str

    def __str__(self) -> str:
        return ".".join(part.partition(" ")[2] or part for part in self if part)


def cause_of(source: str, id: str) -> str:
    """What the steps of a signal belong to; the same for a replay of its dead letter."""
    return f"{source} {_REPLAYED.sub('', id)}"


async def once(
    home: StepHome,
    name: Idempotent,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    on_doubt: Doubt,
    verify: Callable[..., Any] | None,
    returns: Any,
) -> Any:
    """Do the step, unless it is known to be done; see `Context.once`."""
    adapter = _result_adapter(function, returns)
    ledger, cause, key = home.steps, name.cause, name.key
    known = ledger.get(cause, key)
    if known is not None and known.status is StepStatus.DONE:
        return _stored_result(known, adapter)
    if known is not None and on_doubt is Doubt.FAIL:
        raise StepInDoubtError(
            f"Step {key!r} was begun at {known.at}, and it is not known whether it was done"
            + (f" (it raised {known.note})." if known.note else "."),
            hint=f"Find out, then say it by `foundation steps resolve {name.agent} {key}`, "
            "and replay the dead letter.",
            step=key,
            agent=name.agent,
            attempts=known.attempts,
        )
    if known is not None and on_doubt is Doubt.VERIFY:
        assert verify is not None
        try:
            result = await _call(verify, args, str(name))
        except StepNotDoneError:
            pass
        else:
            return await _finish(home, name, result, adapter)
    ledger.begin(cause, key, utc_text())
    await home.store_steps()
    failpoint("step.begun")
    try:
        result = await _call(function, args, str(name))
    except StepNotDoneError:
        ledger.forget(cause, key)
        await home.store_steps()
        raise
    except Exception as error:
        ledger.raised(cause, key, error)
        raise
    failpoint("step.happened")
    return await _finish(home, name, result, adapter)


async def _finish(
    home: StepHome, name: Idempotent, result: Any, adapter: TypeAdapter[Any] | None
) -> Any:
    try:
        body = to_json(result)
    except TypeError as error:
        home.steps.finish(name.cause, name.key, utc_text(), b"null")
        await home.store_steps()
        raise ConfigError(
            f"Step {name.key!r} is done, but its result can't be kept: {error}. "
            "Let it return what JSON can say, or a pydantic model."
        ) from error
    home.steps.finish(name.cause, name.key, utc_text(), body)
    await home.store_steps()
    failpoint("step.done")
    known = home.steps.get(name.cause, name.key)
    assert known is not None
    return _stored_result(known, adapter)


def _stored_result(step: Step, adapter: TypeAdapter[Any] | None) -> Any:
    if step.result is None:
        raise StepTooLargeError(
            f"Step {step.key!r} is done, but its result was too large to be kept.",
            hint="Let it return a reference to the data, or raise `mailbox.steps_max_bytes`.",
        )
    plain = orjson.loads(step.result)
    if adapter is None:
        return plain
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"The stored result of step {step.key!r} does not fit what it should return: "
            f"{first['msg']}"
        ) from error


async def _call(function: Callable[..., Any], args: tuple[Any, ...], idempotency_key: str) -> Any:
    """Await it; a plain function runs in a thread, so that it may block."""
    more = {"idempotency_key": idempotency_key} if _takes_key(function) else {}
    if inspect.iscoroutinefunction(_unwrapped(function)):
        return await function(*args, **more)
    context = contextvars.copy_context()
    call = functools.partial(context.run, function, *args, **more)
    result = await asyncio.get_running_loop().run_in_executor(None, call)
    return await result if inspect.isawaitable(result) else result


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _takes_key(function: Callable[..., Any]) -> bool:
    try:
        return "idempotency_key" in inspect.signature(function).parameters
    except (ValueError, TypeError):
        return False  # of a builtin


def _result_adapter(function: Callable[..., Any], returns: Any) -> TypeAdapter[Any] | None:
    kind = returns
    if kind is None:
        try:
            kind = typing.get_type_hints(_unwrapped(function)).get("return")
        except (NameError, TypeError):
            return None
    if kind in (None, Any, type(None)):
        return None
    try:
        return TypeAdapter(kind)
    except Exception:  # pydantic's own: a type it has no schema for is returned as JSON gives it
        return None


def check_once(key: str, on_doubt: str, verify: object, scope: str) -> Doubt:
    """The policy of a step.

    Raises:
        ConfigError: an argument of `Context.once` is wrong; says which.
    """
    if not key or len(key) > KEY_LENGTH_MAX:
        raise ConfigError(f"a step's key has 1 to {KEY_LENGTH_MAX} characters, got {len(key)}")
    try:
        policy = Doubt(on_doubt)
    except ValueError:
        raise ConfigError(f"on_doubt={on_doubt!r}: use one of {', '.join(Doubt)}") from None
    if (policy is Doubt.VERIFY) != (verify is not None):
        raise ConfigError("on_doubt='verify' needs `verify`, and nothing else does")
    if scope not in ("signal", "agent"):
        raise ConfigError(f"scope={scope!r}: use 'signal' or 'agent'")
    return policy


def resolve(ledger: StepLedger, key: str, signal: str | None, *, done: bool, result: Any) -> Step:
    """What a person has found out about a step in doubt: it is done, or shall be done again.

    Raises:
        NotFoundError: there is no such step in doubt, or more than one.
    """
    found = [step for step in ledger.find(key, signal) if step.status is StepStatus.PENDING]
    if len(found) != 1:
        whose = "" if signal is None else f" of signal {signal}"
        raise NotFoundError(
            f"There is no step {key!r}{whose} in doubt."
            if not found
            else f"{len(found)} signals have a step {key!r} in doubt: name the signal."
        )
    step = found[0]
    if not done:
        ledger.forget(step.cause, step.key)
        return step
    ledger.finish(step.cause, step.key, utc_text(), to_json(result))
    return ledger.find(key, signal)[0]
