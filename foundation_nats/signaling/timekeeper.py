"""Sends what is due: one shared, durable pull consumer of fired timers, served by every node.

Each firing takes effect once: the signal's id derives from the timer and the moment it was
due, and what fired is acknowledged only after the signal is stored and the next moment
is armed. Whoever dies half-way is repeated by another under the same ids; a repeat so late that
the stream may have forgotten the id looks into the mailbox first (`evidence.py`).

A timer is ended by replacing it with a *cancellation*, which fires at once. It is written down
under the timer's name first and checked before each firing and after each re-arming, so that a
firing that is under way on another node can't bring the timer back.

Not covered: a firing for many that is repeated later than the stream remembers ids may reach
the same receiver twice only if its copies were consumed and trimmed meanwhile.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import orjson

from foundation_nats.base.clock import utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.assets import TIMEKEEPER, TIMER_ACK_WAIT_S
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import StreamReader, append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    MailboxFullError,
    NotFoundError,
    PayloadTooLargeError,
    StaleRevisionError,
)
from foundation_nats.signaling.burial import bury
from foundation_nats.signaling.envelope import message_id
from foundation_nats.signaling.evidence import SAFE_SHARE, is_stored, server_now
from foundation_nats.signaling.pulling import NAK_S, Puller, delivered, sequence
from foundation_nats.signaling.schedules import Timer, read_timer, time_text, timer_headers
from foundation_schemas import Target, TargetKind

_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_CANCELLED_TTL = "3600s"


def fired_envelope(body: dict[str, Any], timer: Timer) -> dict[str, Any]:
    """The signal that one firing sends; the same at each repeat but for its time."""
    after = {**body, "time": utc_text()}
    if timer.repeats:
        after["id"] = f"{body['id']}.{timer.due.strftime('%Y%m%dT%H%M%S%f')}"
    if timer.ttl_s is not None:
        after["deadline"] = time_text(timer.due + timedelta(seconds=timer.ttl_s))
    return after


async def cancelled_below(timers: StreamReader, subjects: Subjects, owner: str, name: str) -> int:
    """The generation below which timers of that name are cancelled; 0: none are."""
    found = await timers.last_from_leader(subjects.cancelled(owner, name))
    return 0 if found is None else int(found.headers.get("Fnd-Generation", "0"))


class Timekeeper:
    """Serves the TIMERS stream until its task is cancelled."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        full_patience_s: float = 30.0,
        window_s: float = 120.0,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._tries_max = max(2, int(full_patience_s / NAK_S))
        self._window_s = window_s
        self._timers = StreamReader(bus, subjects.timers_stream)
        self._signals = StreamReader(bus, subjects.signals_stream)
        self._log = get_logger("timekeeper")
        self._puller = Puller(
            bus, subjects.timers_stream, TIMEKEEPER, self._handle, ack_wait_s=TIMER_ACK_WAIT_S
        )

    async def run(self) -> None:
        """Pull, send, arm, acknowledge, for ever."""
        await self._puller.run()

    async def _handle(self, message: Message, taken_at: float) -> None:
        if self._puller.is_late(taken_at):
            return
        failpoint("timer.before")
        try:
            await self._fire(message)
            failpoint("timer.before_ack")
            await self._timers.delete(sequence(message))
            self._puller.done(message)
        except (MailboxFullError, BusTimeoutError, BusUnavailableError, NotFoundError) as error:
            self._log.info("firing put off", error=str(error))
            self._puller.again(message)
        except FoundationError as error:
            self._log.error("firing refused; it will be tried again", error=str(error))
            self._puller.again(message)

    async def _fire(self, message: Message) -> None:
        headers = message.headers() if message.raw_headers else {}
        # fnd.C.timer.<owner>.<name>
        tokens = headers.get("Nats-Scheduler", "").split(".")
        try:
            timer = read_timer(headers)
            if len(tokens) != 5 or tokens[:3] != ["fnd", self._subjects.cluster, "timer"]:
                raise ValueError("it was not fired by a timer")
        except ValueError as error:
            self._log.warning("not a timer of ours, dropped", error=str(error))
            return
        owner, name = tokens[3:]
        if timer.is_cancel:
            await self._cancel(owner, name, timer.generation)
            return
        if await self._ended(owner, name) > timer.generation:
            return
        await self._send(message, timer)
        failpoint("timer.after_publish")
        if timer.repeats:
            await self._arm(message.data, owner, name, timer)
            ended = await self._ended(owner, name)
            if ended > timer.generation:
                await self._disarm(owner, name, ended)

    async def _ended(self, owner: str, name: str) -> int:
        return await cancelled_below(self._timers, self._subjects, owner, name)

    async def _cancel(self, owner: str, name: str, generation: int) -> None:
        if await self._ended(owner, name) < generation:
            headers = {
                "Fnd-Generation": str(generation),
                "Nats-Rollup": "sub",
                "Nats-TTL": _CANCELLED_TTL,
            }
            await append(self._bus, self._subjects.cancelled(owner, name), b"", headers=headers)
        await self._disarm(owner, name, generation)

    async def _disarm(self, owner: str, name: str, below: int) -> None:
        """Remove what is armed under that name, if it is of a generation under *below*."""
        subject = self._subjects.timer(owner, name)
        armed = await self._timers.last_from_leader(subject)
        if armed is not None and int(armed.headers.get("Fnd-Generation", "0")) < below:
            await self._timers.delete(armed.sequence)

    # ---- the signal -------------------------------------------------------------

    async def _send(self, message: Message, timer: Timer) -> None:
        msg_id = blake2b(message.data + time_text(timer.due).encode(), digest_size=16).hexdigest()
        try:
            body = fired_envelope(orjson.loads(message.data), timer)
            target = Target.parse(body["subject"])
            msg_id = message_id(str(target), str(body["source"]), str(body["id"]))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"A timer's signal is none: {type(error).__name__}: {error}"
            await self._bury(message, "route", "bus.decode", reason, msg_id)
            return
        is_one = target.kind is TargetKind.AGENT
        place = self._subjects
        subject = place.mailbox(target.name) if is_one else place.route(target)
        if is_one and await self._is_repeated(subject, msg_id, timer):
            return
        try:
            await append(self._bus, subject, orjson.dumps(body), headers={"Nats-Msg-Id": msg_id})
        except (MailboxFullError, PayloadTooLargeError) as error:
            if isinstance(error, MailboxFullError) and delivered(message) < self._tries_max:
                raise
            agent = target.name if is_one else "route"
            reason = f"A timer's signal could not be stored: {error}"
            await self._bury(message, agent, error.code, reason, f"{msg_id}.timer")

    async def _is_repeated(self, subject: str, msg_id: str, timer: Timer) -> bool:
        """Whether it was stored by an earlier try that is so long ago that its id is forgotten."""
        now = await server_now(self._signals)
        if now is None or (now - timer.due).total_seconds() < self._window_s * SAFE_SHARE:
            return False
        return await is_stored(self._signals, subject, msg_id, timer.due)

    async def _bury(
        self, message: Message, agent: str, code: str, reason: str, msg_id: str
    ) -> None:
        await bury(
            self._bus,
            self._subjects,
            agent,
            message.data,
            code=code,
            reason=reason,
            msg_id=msg_id,
            attempts=delivered(message),
        )

    # ---- the next time ----------------------------------------------------------

    async def _arm(self, data: bytes, owner: str, name: str, timer: Timer) -> None:
        """Arm the next firing, unless there is one, or the timer was replaced meanwhile."""
        now = await server_now(self._timers)
        try:
            after = replace(timer, due=timer.after(now or timer.due))
        except ValueError as error:
            self._log.info("timer has no next time", owner=owner, name=name, error=str(error))
            return
        headers = timer_headers(after, self._subjects.due())
        subject = self._subjects.timer(owner, name)
        try:
            await append(self._bus, subject, data, headers={**headers, _EXPECTED: "0"})
        except StaleRevisionError:
            if await self._timers.last_from_leader(subject) is None:
                # It was another write in flight, or has fired since: look at it once more.
                raise BusUnavailableError(f"{subject} is being written.") from None
