"""What the floor's modules share on the wire: connecting, request mux, bulk reads.

IO: NATS through the public interface of nats-py alone. Any error the client
reports ends the process: a floor that retries would hide what it costs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import nats
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from foundation_nats.bus.floor.server import FloorError
from foundation_nats.bus.login import login_options
from foundation_nats.config import Config
from foundation_nats.discovery.contexts import applied

REPLY_TIMEOUT_S = 10.0
RECORDS_PER_READ_MAX = 1024  # the server's limit for one multi_last


async def _give_up(error: Exception) -> None:
    traceback.print_exception(error, file=sys.stderr)
    os._exit(1)


@asynccontextmanager
async def connected(url: str, *, strict: bool = True) -> AsyncIterator[Client]:
    """A connection; with `strict` any asynchronous error ends the process at once.

    `strict` is for child processes. Whoever lives in somebody else's process sees
    such an error as an answer that does not come, and in nats-py's log. Who it logs
    in as is in the environment (`Config.load`).
    """
    connection = await nats.connect(
        url,
        **login_options(applied(Config.load().bus)),
        allow_reconnect=False,
        skip_subject_validation=True,  # every subject is made by us
        error_cb=_give_up if strict else None,
    )
    try:
        yield connection
    finally:
        await connection.close()


async def fresh_bucket(js: JetStreamContext, name: str) -> None:
    """An empty key-value bucket on disk, readable by Direct Get."""
    await forget_stream(js, f"KV_{name}")
    await js.create_key_value(KeyValueConfig(name, storage=StorageType.FILE, direct=True))


async def fresh_stream(js: JetStreamContext, config: StreamConfig) -> None:
    """An empty stream."""
    assert config.name is not None
    await forget_stream(js, config.name)
    await js.add_stream(config)


async def forget_stream(js: JetStreamContext, name: str) -> None:
    """Delete a stream if it is there."""
    with suppress(NotFoundError):
        await js.delete_stream(name)


async def last_of_each(connection: Client, stream: str, filter_subject: str) -> list[Msg]:
    """The last message of every subject that matches, by one Direct Get."""
    messages: list[Msg] = []
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def collect(message: Msg) -> None:
        status = (message.headers or {}).get("Status")
        if status is None:
            messages.append(message)
        elif not finished.done():
            if status in ("204", "404"):
                finished.set_result(None)
            else:
                finished.set_exception(FloorError(f"multi_last answered {message.headers}"))

    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox, cb=collect)
    question = {"multi_last": [filter_subject], "batch": RECORDS_PER_READ_MAX}
    await connection.publish(f"$JS.API.DIRECT.GET.{stream}", orjson.dumps(question), reply=inbox)
    try:
        await asyncio.wait_for(finished, REPLY_TIMEOUT_S)
    finally:
        await subscription.unsubscribe()
    return messages


class Mux:
    """Requests over one inbox: a counter for the token and one future per request.

    It does what ``Client.request`` does without a random token and without a timer
    per request; whoever waits for many answers puts one timeout around them all.
    """

    def __init__(self, connection: Client) -> None:
        self._connection = connection
        self._inbox = connection.new_inbox()
        self._prefix = len(self._inbox) + 1
        self._tokens = itertools.count()
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Subscribe the inbox."""
        await self._connection.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        await self._connection.flush()

    async def _on_answer(self, message: Msg) -> None:
        future = self._waiting.pop(message.subject[self._prefix :], None)
        if future is not None and not future.done():
            future.set_result(message)

    async def ask(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> Msg:
        """One request; "no responders" comes back as a message with that status."""
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = self._loop.create_future()
        self._waiting[token] = future
        try:
            await self._connection.publish(
                subject, payload, reply=f"{self._inbox}.{token}", headers=headers
            )
            return await future
        finally:
            self._waiting.pop(token, None)


def is_unanswered(message: Msg) -> bool:
    """Nobody was subscribed to what we asked."""
    return not message.data and (message.headers or {}).get("Status") == "503"


def stored_at(message: Msg) -> int:
    """The sequence in a publish acknowledgement.

    Raises:
        FloorError: the server refused to store the message.
    """
    answer: dict[str, Any] = (
        orjson.loads(message.data) if message.data else {"error": message.headers}
    )
    if "error" in answer:
        raise FloorError(f"the server refused a write: {answer['error']}")
    return int(answer["seq"])
