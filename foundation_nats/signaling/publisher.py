"""`send`: durable once the receipt is back, and once only however often it is retried.

A receipt means that the broker stored the signal. Until the time-out the
publisher retries by itself, always under the same id, across reconnects and
broker elections; what times out is `BusTimeoutError` with outcome *unknown*,
and sending the same `id` again is safe.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import PubAck, StreamReader, append, append_nowait
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConflictError,
    FoundationError,
)
from foundation_nats.signaling.envelope import encode_envelope, message_id
from foundation_nats.signaling.schedules import SIGNALS, Timer, timer_headers, timer_name
from foundation_schemas import Receipt, Target, TargetKind

_RETRY_FIRST_S = 0.02
_RETRY_MAX_S = 0.5
_ATTEMPT_S = 2.0
_ADDRESSES_MAX = 10_000


class Publisher:
    """Sends signals for one source."""

    def __init__(self, bus: Bus, subjects: Subjects, source: str) -> None:
        self._bus = bus
        self._subjects = subjects
        self.source = source
        self._id_prefix = token_hex(8)
        self._ids = itertools.count(1)
        self._addresses: dict[Target, tuple[str, str]] = {}

    def subject(self, target: Target) -> str:
        """Where signals for *target* are stored."""
        if target.kind is TargetKind.AGENT:
            return self._subjects.mailbox(target.name)
        return self._subjects.route(target)

    def _address(self, target: Target) -> tuple[str, str]:
        """A target's text and subject; remembered, because few targets get many signals."""
        found = self._addresses.get(target)
        if found is None:
            if len(self._addresses) >= _ADDRESSES_MAX:
                self._addresses.clear()
            found = self._addresses[target] = (str(target), self.subject(target))
        return found

    async def send(
        self,
        target: Target,
        type: str,
        data: Any,
        *,
        id: str | None = None,
        timeout: float,
        traceparent: str | None = None,
        cause: str | None = None,
        deadline: str | None = None,
        timer: Timer | None = None,
        attempts: int | None = None,
        replyto: str | None = None,
        urgent: bool = False,
    ) -> Receipt:
        """Store a signal for *target*; with *timer* for later, under its id as the timer's name.

        Cancellation: the signal may or may not be stored; send the same id again to be sure.

        Raises:
            MailboxFullError: the receiver does not keep up; nothing was stored.
            PayloadTooLargeError: it would not fit; nothing was sent.
            BusUnavailableError: no broker within *timeout*; nothing was stored.
            BusTimeoutError: outcome unknown.
            PermissionDeniedError, BusRefusedError: nothing was stored.
        """
        name, subject = self._address(target)
        signal_id = id or f"{self._id_prefix}-{next(self._ids)}"
        payload = encode_envelope(
            id=signal_id,
            source=self.source,
            type=type,
            target=name,
            data=data,
            traceparent=traceparent,
            cause=cause,
            deadline=deadline,
            attempts=attempts,
            replyto=replyto,
            urgent=urgent,
        )
        msg_id = message_id(name, self.source, signal_id)
        headers = None
        if timer is not None:
            subject = self._subjects.timer(SIGNALS, timer_name(signal_id))
            # One that was cancelled may be set again under its id.
            msg_id = message_id(name, self.source, f"{signal_id}\n{timer.generation}")
            headers = timer_headers(timer, self._subjects.due())
        ack = await self.store(subject, payload, msg_id, timeout=timeout, headers=headers)
        return Receipt(
            id=signal_id,
            target=name,
            stream=ack.stream,
            sequence=ack.sequence,
            duplicate=ack.duplicate,
        )

    async def store(
        self,
        subject: str,
        payload: bytes,
        msg_id: str,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> PubAck:
        """Append with retries until *timeout*; raises as `send`."""
        deadline = monotonic() + timeout
        delay = _RETRY_FIRST_S
        unknown: BusTimeoutError | None = None
        headers = {"Nats-Msg-Id": msg_id, **(headers or {})}
        if planted("ack_before_store"):
            append_nowait(self._bus, subject, payload, lambda ack: None, headers=headers)
            return PubAck("", 0, False)
        while True:
            left = deadline - monotonic()
            try:
                if not self._bus.has_room:
                    await self._bus.wait_room()
                failpoint("send.before_publish")
                ack = await append(
                    self._bus,
                    subject,
                    payload,
                    headers=headers,
                    timeout=max(0.05, min(left, _ATTEMPT_S)),
                )
                failpoint("send.after_publish_before_ack")
                if ack.duplicate:
                    await self._check_duplicate(ack, subject)
                return ack
            except BusTimeoutError as error:
                unknown = error
            except BusUnavailableError as error:
                if monotonic() + delay >= deadline:
                    raise unknown or error from None
            if monotonic() + delay >= deadline:
                assert unknown is not None
                raise BusTimeoutError(
                    f"No receipt for the signal within {timeout:g} s.",
                    hint="It may be stored all the same: send it again with the same id.",
                ) from unknown
            await asyncio.sleep(delay)
            delay = min(delay * 2, _RETRY_MAX_S)

    async def _check_duplicate(self, ack: PubAck, subject: str) -> None:
        # A remembered id must be ours: the same message on the same subject, or one
        # that was consumed and trimmed since.
        try:
            stored = await StreamReader(self._bus, ack.stream).at_sequence(ack.sequence)
        except (BusError, FoundationError):
            return
        if stored is not None and stored.subject != subject:
            raise ConflictError(
                "The signal's id is already in use by another signal; nothing was stored.",
                hint="Choose another id.",
            )
