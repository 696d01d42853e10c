"""Append with an acknowledgement, and read back: what we use of JetStream besides buckets.

Facts verified on nats-server 2.15.1:

- A publish to a subject of a stream is acknowledged on its reply subject by
  ``{"stream","seq"[,"duplicate"]}`` or ``{"error":{"err_code"}}``; status 503
  means that no stream (or no leader of it) listens.
- 10071 is a lost compare-and-set, but R1 also answers it to the repeat of
  one's own write; 10164 (replicated streams) means that another write of the
  key is in flight. Both say: read the key from the leader and compare.
- 10077 covers both a full subject and a full stream.
- Batched Direct Get ends with status 204, or 404 where nothing matches; it may
  be answered by any replica and so be stale. ``STREAM.MSG.GET`` asks the leader.
- ``multi_last`` refuses more than 1,024 subjects (413).
- A replica that has fallen silent (its cable is pulled) is given Direct Gets until the other
  servers drop the routes to it: by the default times of ``cluster.ping_interval`` that was half
  a minute, in which every second to third Direct Get had no answer. What has none for a second
  is asked again, then of the leader.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import direct_get, js_api
from foundation_nats.bus.wire import Message
from foundation_nats.errors import (
    BusError,
    BusRefusedError,
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    MailboxFullError,
    NoRespondersError,
    NotFoundError,
    PermissionDeniedError,
    StaleRevisionError,
)

MULTI_LAST_MAX = 1000
PAGE = 256
_FRESH_TRIES = 50
_FRESH_PAUSE_S = 0.05
_SILENCE_S = 1.0
"""How long a replica may say nothing before its question is put again."""
_REPLICAS_TRIED = 2
_LEADER_AT_ONCE = 50

WRONG_LAST_SEQUENCE = 10071
WRITE_IN_FLIGHT = 10164
STORE_FULL = 10077
STREAM_NOT_FOUND = 10059
NO_MESSAGE = 10037


class PubAck(NamedTuple):
    """The server stored the message (or had it already)."""

    stream: str
    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as the stream holds it."""

    subject: str
    sequence: int
    data: bytes
    headers: Mapping[str, str]
    time: str = ""


OnAck = Callable[[PubAck | FoundationError], None]


def translate(error: Mapping[str, Any], subject: str) -> FoundationError:
    """A JetStream API error as one of ours."""
    code = int(error.get("err_code", 0))
    text = str(error.get("description", "refused"))
    if code in (WRONG_LAST_SEQUENCE, WRITE_IN_FLIGHT):
        return StaleRevisionError(
            f"{subject} has changed ({text}).", err_code=code, in_flight=code == WRITE_IN_FLIGHT
        )
    if code == STORE_FULL:
        if "per subject" in text:
            return MailboxFullError(
                f"The mailbox {subject} is full.",
                hint="Send more slowly, add replicas, or raise the mailbox limit.",
                subject=subject,
            )
        return MailboxFullError(
            f"The store of {subject} is full ({text}).",
            hint="Handle or discard what is stored, or raise max_file on the server.",
            subject=subject,
        )
    if code in (STREAM_NOT_FOUND, NO_MESSAGE):
        return NotFoundError(f"{subject}: {text}.", err_code=code)
    if int(error.get("code", 0)) in (503, 429):
        return BusUnavailableError(f"JetStream can't serve {subject} now ({text}).", err_code=code)
    return BusRefusedError(f"JetStream refused {subject}: {text}.", err_code=code)


def append_nowait(
    bus: Bus,
    subject: str,
    payload: bytes,
    on_ack: OnAck,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> None:
    """Publish to a stream; *on_ack* is called once with the acknowledgement or an error.

    Raises:
        BusUnavailableError, PayloadTooLargeError: nothing was sent and *on_ack* is not called.
    """

    bus.request_nowait(
        subject,
        payload,
        lambda reply: on_ack(_acknowledged(reply, subject)),
        headers=headers,
        timeout=timeout,
    )


def _acknowledged(reply: Message | BusError, subject: str) -> PubAck | FoundationError:
    """What a stream's reply to a publish means."""
    if not isinstance(reply, BusError):
        return _read_ack(reply, subject)
    if isinstance(reply, NoRespondersError):
        return BusUnavailableError(
            f"No stream takes {subject}.", hint="Is JetStream up, and does it have a leader?"
        )
    return reply


def _read_ack(reply: Message, subject: str) -> PubAck | FoundationError:
    try:
        body = orjson.loads(reply.data)
        if "error" in body:
            return translate(body["error"], subject)
        return PubAck(body["stream"], body["seq"], body.get("duplicate", False))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return BusRefusedError(f"{subject} was answered by something that is not JetStream.")


async def append(
    bus: Bus,
    subject: str,
    payload: bytes,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> PubAck:
    """Publish to a stream and wait for the acknowledgement; a single attempt.

    Raises:
        MailboxFullError, StaleRevisionError, BusRefusedError: not stored.
        BusUnavailableError: not stored; worth a retry.
        BusTimeoutError: outcome unknown; retry with the same ``Nats-Msg-Id``.
    """
    future: asyncio.Future[Message | BusError] = asyncio.get_running_loop().create_future()

    def on_reply(reply: Message | BusError) -> None:
        if not future.done():
            future.set_result(reply)

    bus.request_nowait(subject, payload, on_reply, headers=headers, timeout=timeout)
    ack = _acknowledged(await future, subject)
    if isinstance(ack, FoundationError):
        raise ack
    return ack


async def api(
    bus: Bus, verb: str, name: str = "", body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One JetStream API request.

    Raises:
        NotFoundError, BusRefusedError, BusUnavailableError, BusTimeoutError
    """
    subject = js_api(verb, name)
    reply = await bus.request(subject, orjson.dumps(body) if body is not None else b"")
    found: dict[str, Any] = orjson.loads(reply.data)
    if "error" in found:
        raise translate(found["error"], f"{verb} {name}".strip())
    return found


def identity(info: Mapping[str, Any]) -> tuple[str, str]:
    """Of a stream's description, what changes when it is made anew or led by another server."""
    return info.get("created", ""), (info.get("cluster") or {}).get("leader", "")


class _SilentError(Exception):
    """Whoever was asked said nothing for too long; stays in this module."""


def _portions(count: int) -> Iterable[tuple[int, int]]:
    """One, then many at once."""
    start, end = 0, 1
    while start < count:
        yield start, min(end, count)
        start, end = end, end + _LEADER_AT_ONCE


class StreamReader:
    """Reads and trims one stream."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self._bus = bus
        self.stream = stream

    async def info(self) -> dict[str, Any]:
        """The server's description: ``state.last_seq``, ``state.messages``, ``ts`` (its clock) …"""
        return await api(self._bus, "STREAM.INFO", self.stream)

    async def subjects(self, pattern: str) -> dict[str, int]:
        """Every subject that matches and has messages, to their number."""
        found: dict[str, int] = {}
        while True:
            body = {"subjects_filter": pattern, "offset": len(found)}
            part = await api(self._bus, "STREAM.INFO", self.stream, body)
            listed = part["state"].get("subjects") or {}
            found.update(listed)
            if not listed or len(found) >= part.get("total", 0):
                return found

    async def page(
        self,
        subject: str | None,
        start: int,
        *,
        batch: int = PAGE,
        start_time: str | None = None,
    ) -> tuple[list[StoredMessage], int]:
        """Messages from sequence *start* on (or from *start_time*), and how many more there are.

        May be answered by a replica that lags behind the leader.

        Raises:
            BusTimeoutError, BusUnavailableError, BusRefusedError
        """
        body: dict[str, Any] = {"batch": batch}
        if start_time is not None:
            body["start_time"] = start_time
        else:
            body["seq"] = start
        if subject is not None:
            body["next_by_subj"] = subject
        messages, more, _ = await self._collect(body)
        return messages, more

    async def last_of(self, subjects: Iterable[str]) -> dict[str, StoredMessage]:
        """The last message of each subject that has one; a replica may answer."""
        wanted = list(subjects)
        found: dict[str, StoredMessage] = {}
        for start in range(0, len(wanted), MULTI_LAST_MAX):
            messages, *_ = await self._last_of(wanted[start : start + MULTI_LAST_MAX])
            found.update((message.subject, message) for message in messages)
        return found

    async def last_of_by_now(
        self, subjects: Iterable[str], *, newest: int | None = None
    ) -> dict[str, StoredMessage]:
        """`last_of`, and nothing older than this call: a replica that lags is asked again.

        *newest* is the stream's last sequence, where the caller has just asked for it.

        Raises:
            BusTimeoutError: no replica has caught up in time.
        """
        wanted = list(subjects)
        found: dict[str, StoredMessage] = {}
        if not wanted:
            return found
        if newest is None:
            newest = int((await self.info())["state"]["last_seq"])
        # An answer without any message doesn't say how old it is: ask for one that is there.
        present = await self.last_from_leader(">")
        if present is None:
            return found
        for start in range(0, len(wanted), MULTI_LAST_MAX):
            chunk = wanted[start : start + MULTI_LAST_MAX]
            for _ in range(_FRESH_TRIES):
                messages, _, up_to = await self._last_of([*{*chunk, present.subject}])
                if up_to >= newest:
                    found.update((message.subject, message) for message in messages)
                    break
                if not messages:
                    # It was there, and has been removed since.
                    for subject in chunk:
                        message = await self.last_from_leader(subject)
                        if message is not None:
                            found[subject] = message
                    break
                await asyncio.sleep(_FRESH_PAUSE_S)
            else:
                raise BusTimeoutError(f"The replicas of {self.stream} lag behind its leader.")
        if present.subject not in wanted:
            found.pop(present.subject, None)
        return found

    async def _last_of(self, subjects: list[str]) -> tuple[list[StoredMessage], int, int]:
        return await self._collect({"multi_last": subjects, "batch": MULTI_LAST_MAX + 24})

    async def _collect(self, body: Mapping[str, Any]) -> tuple[list[StoredMessage], int, int]:
        """The messages, how many follow, and (of ``multi_last``) how far the replica was.

        Where replicas are silent the leader is asked, message by message; then how many follow
        is only whether any may.
        """
        for _ in range(_REPLICAS_TRIED):
            try:
                return await self._direct(body, patience=_SILENCE_S)
            except _SilentError:
                continue
        try:
            return await self._by_leader(body)
        except PermissionDeniedError:
            # Credentials may allow one way of reading alone.
            return await self._direct(body)

    async def _by_leader(self, body: Mapping[str, Any]) -> tuple[list[StoredMessage], int, int]:
        """What a Direct Get of *body* would find, asked of the leader; nothing is newer."""
        messages: list[StoredMessage] = []
        subjects: list[str] | None = body.get("multi_last")
        if subjects is not None:
            # One alone first: many would only add to the trouble of a leader that is in some.
            for start, end in _portions(len(subjects)):
                found = await asyncio.gather(*map(self.last_from_leader, subjects[start:end]))
                messages += [message for message in found if message is not None]
            messages.sort(key=lambda message: message.sequence)
            return messages, 0, sys.maxsize
        question = {key: body[key] for key in ("seq", "start_time") if key in body}
        subject = body.get("next_by_subj", ">")
        while len(messages) < body["batch"]:
            message = await self._get({**question, "next_by_subj": subject})
            if message is None:
                return messages, 0, 0
            messages.append(message)
            question = {"seq": message.sequence + 1}
        return messages, 1, 0

    async def _direct(
        self, body: Mapping[str, Any], *, patience: float | None = None
    ) -> tuple[list[StoredMessage], int, int]:
        """One Direct Get; *patience*: how long nothing may come.

        Raises:
            _SilentError: nothing came for so long.
            BusTimeoutError, BusUnavailableError, BusRefusedError
        """
        loop = asyncio.get_running_loop()
        messages: list[StoredMessage] = []
        done: asyncio.Future[tuple[int, int]] = loop.create_future()
        heard_at = loop.time()
        timer: asyncio.TimerHandle | None = None

        def on_reply(reply: Message | BusError) -> None:
            nonlocal heard_at
            if done.done():
                return
            if isinstance(reply, BusError):
                done.set_exception(reply)
            elif reply.status == 204 and not reply.data:
                done.set_result(
                    (
                        int(reply.header(b"Nats-Num-Pending") or b"0"),
                        int(reply.header(b"Nats-UpTo-Sequence") or b"0"),
                    )
                )
            elif reply.status == 404:
                done.set_result((0, 0))
            elif reply.status:
                done.set_exception(
                    BusRefusedError(
                        f"Direct Get on {self.stream}: {reply.status} {reply.status_text}."
                    )
                )
            else:
                heard_at = loop.time()
                headers = reply.headers()
                messages.append(
                    StoredMessage(
                        headers["Nats-Subject"],
                        int(headers["Nats-Sequence"]),
                        reply.data,
                        headers,
                        headers.get("Nats-Time-Stamp", ""),
                    )
                )

        def listen(patience: float) -> None:
            nonlocal timer
            if done.done():
                return
            left = heard_at + patience - loop.time()
            if left <= 0:
                done.set_exception(_SilentError(f"A replica of {self.stream} is silent."))
            else:
                timer = loop.call_later(left, listen, patience)

        token = self._bus.request_nowait(
            direct_get(self.stream), orjson.dumps(body), on_reply, many=True
        )
        if patience is not None:
            listen(patience)
        try:
            pending, up_to = await done
        except NoRespondersError as error:
            raise BusUnavailableError(f"No server answers reads of {self.stream}.") from error
        finally:
            if timer is not None:
                timer.cancel()
            self._bus.forget(token)
        return messages, pending, up_to

    async def last_from_leader(self, subject: str) -> StoredMessage | None:
        """The last message of *subject*, as the stream's leader knows it; None if there is none."""
        return await self._get({"last_by_subj": subject})

    async def first_since(self, subject: str, time: str) -> StoredMessage | None:
        """The first message of *subject* that was stored at *time* or later, as the leader knows it."""
        return await self._get({"start_time": time, "next_by_subj": subject})

    async def next_of(self, subject: str, sequence: int) -> StoredMessage | None:
        """The first message of *subject* from *sequence* on, as the leader knows it."""
        return await self._get({"seq": sequence, "next_by_subj": subject})

    async def at_sequence(self, sequence: int) -> StoredMessage | None:
        """The message with this sequence; None if it is gone."""
        return await self._get({"seq": sequence})

    async def _get(self, body: Mapping[str, Any]) -> StoredMessage | None:
        try:
            found = (await api(self._bus, "STREAM.MSG.GET", self.stream, body))["message"]
        except NotFoundError as error:
            if error.details.get("err_code") == NO_MESSAGE:
                return None
            raise
        headers: dict[str, str] = {}
        if "hdrs" in found:
            raw = base64.b64decode(found["hdrs"])
            headers = Message("", "", b"", raw).headers()
        return StoredMessage(
            found["subject"],
            found["seq"],
            base64.b64decode(found.get("data", "")),
            headers,
            found.get("time", ""),
        )

    async def purge(self, subject: str, *, below: int | None = None) -> int:
        """Remove *subject*'s messages with a sequence under *below* (None: all); returns how many."""
        body: dict[str, Any] = {"filter": subject}
        if below is not None:
            body["seq"] = below
        purged: int = (await api(self._bus, "STREAM.PURGE", self.stream, body))["purged"]
        return purged

    async def delete(self, sequence: int) -> bool:
        """Remove one message; False if it was gone."""
        try:
            await api(self._bus, "STREAM.MSG.DELETE", self.stream, {"seq": sequence})
        except (NotFoundError, BusRefusedError):
            if await self.at_sequence(sequence) is None:
                return False
            raise
        return True


__all__ = [
    "BusTimeoutError",
    "OnAck",
    "PubAck",
    "StoredMessage",
    "StreamReader",
    "api",
    "append",
    "append_nowait",
    "identity",
    "translate",
]
