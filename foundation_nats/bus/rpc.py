"""Typed request and reply over core subjects, with errors that survive the wire.

A reply goes only to an inbox (F10): a request that names any other reply
subject is dropped, so that nobody can make a node write where it may and they
may not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import BusError, DecodeError, FoundationError, error_from_wire
from foundation_schemas.base import WireModel

M = TypeVar("M", bound=WireModel)
Served = Callable[[bytes], Awaitable[WireModel | None]]

REPLY_PREFIX = "_INBOX."


def encode(model: WireModel) -> bytes:
    """A wire model as JSON."""
    return model.model_dump_json(exclude_none=True).encode()


def decode(kind: type[M], data: bytes) -> M:
    """A wire model from JSON.

    Raises:
        DecodeError: the bytes are not of this kind.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DecodeError(f"Not a {kind.__name__}: {where}: {first['msg']}.") from error


def to_json(value: Any) -> bytes:
    """Any plain or pydantic value as JSON.

    Raises:
        TypeError: it holds something JSON can't say.
    """
    return orjson.dumps(value, default=_default, option=orjson.OPT_NON_STR_KEYS)


def _default(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(f"{type(value).__name__} is not JSON")


def error_body(error: FoundationError) -> dict[str, Any]:
    """An error as it crosses the bus."""
    details = {
        key: value
        for key, value in error.details.items()
        if isinstance(value, str | int | float | bool | list | dict | None)
    }
    return {"error": {"code": error.code, "message": str(error), "details": details}}


def read_reply(data: bytes) -> Any:
    """The result in a reply.

    Raises:
        FoundationError: the peer's error, as the class it was.
        DecodeError: the bytes are no reply of ours.
    """
    try:
        body = orjson.loads(data)
        if "error" in body:
            error = body["error"]
            raise error_from_wire(error["code"], error["message"], error.get("details", {}))
        return body.get("ok")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DecodeError("The reply is not one of this platform's.") from error


def serve(bus: Bus, scope: TaskScope, subject: str, handler: Served) -> Route:
    """Answer requests on *subject* with what *handler* returns or raises.

    Each request runs as a task of *scope*; the handler bounds its own time.
    """
    log = get_logger("rpc")

    def on_message(message: Message) -> None:
        if message.reply and not message.reply.startswith(REPLY_PREFIX):
            log.warning("request with a foreign reply subject dropped", subject=message.subject)
            return
        scope.start(answer(message), "rpc")

    async def answer(message: Message) -> None:
        try:
            result = await handler(message.data)
            body = b'{"ok":%b}' % (b"null" if result is None else encode(result))
        except FoundationError as error:
            body = orjson.dumps(error_body(error))
        if message.reply:
            try:
                bus.publish(message.reply, body)
            except BusError as error:
                log.warning("reply not sent", subject=message.subject, error=str(error))

    return bus.subscribe(subject, on_message)


async def call(
    bus: Bus,
    subject: str,
    request: WireModel | None,
    reply: type[M],
    *,
    timeout: float,
) -> M:
    """Ask *subject* and return its typed reply.

    Raises:
        NoRespondersError: nobody listens there.
        BusTimeoutError: no reply in time; the peer may have acted.
        FoundationError: what the peer raised.
    """
    payload = b"" if request is None else encode(request)
    answer = await bus.request(subject, payload, timeout=timeout)
    found = read_reply(answer.data)
    try:
        return reply.model_validate(found)
    except ValidationError as error:
        raise DecodeError(f"{subject} did not answer with a {reply.__name__}.") from error


async def tell(bus: Bus, subject: str, request: WireModel | None, *, timeout: float) -> None:
    """Ask *subject* to do something that has no result; errors as in `call`."""
    payload = b"" if request is None else encode(request)
    read_reply((await bus.request(subject, payload, timeout=timeout)).data)
