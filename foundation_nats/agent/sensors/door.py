"""`Door`: one HTTP port of this process, and the endpoints behind all such ports of a cluster.

Of the processes of a machine one has the port; the others find out that it is one of us, and try again
now and then, for when it ends. A request for a path that no agent of the listening process has is passed
on over the bus to whoever has it, in whatever process or node. So every node where one of the agents runs
listens, and any of them takes requests for all: whatever balances load in front need not know who runs where.

Passing on is a plain request: at most once, and without an answer in time the sender is told 503, that is
*not known*. Served by uvicorn.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from foundation_nats.agent.sensors.sensor import Surroundings
from foundation_nats.base.asgi import quiet_server
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.wire import Message
from foundation_nats.errors import (
    BusError,
    ConfigError,
    FoundationError,
    NoRespondersError,
    SensorError,
)

BYTES_MAX = 256 * 1024
TIMEOUT_MAX_S = 25.0
_FORWARD_S = 30.0
_START_S = 10.0
_LOOK_S = 1.0
_LISTEN_AGAIN_S = 1.0
_RETRY_AFTER_S = 1
_KNOWN_MAX = 1000
_GREETING = b"x-foundation-cluster"
_PROBE = "/~"
_HAND_MAX = 512
_DOUBT_S = 2.0

Parts = dict[str, Any]
Receive = Callable[[], Awaitable[Parts]]
Send = Callable[[Parts], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, its body read."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sender is told."""

    status: int
    body: dict[str, Any]
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path, and the agent that answers."""

    owner: str
    path: str
    methods: frozenset[str]
    bytes_max: int
    handle: Callable[[Request], Awaitable[Answer]]

    async def answer(self, request: Request) -> Answer:
        """What it says to *request*; never raises but for cancellation."""
        if request.method not in self.methods:
            allowed = ", ".join(sorted(self.methods))
            return Answer(405, {"error": f"use {allowed}"}, (("allow", allowed),))
        if len(request.body) > self.bytes_max:
            return too_large(self.bytes_max)
        try:
            return await self.handle(request)
        except Exception as error:  # else the sender would wait for an answer
            get_logger("sensors").error("webhook failed", agent=self.owner, exc_info=error)
            return unavailable("it failed")


def unavailable(why: str) -> Answer:
    """Try again."""
    return Answer(503, {"error": why}, (("retry-after", str(_RETRY_AFTER_S)),))


def too_large(limit: int) -> Answer:
    """The body is; the rest of it may be unread."""
    return Answer(413, {"error": f"the body may have {limit:,} bytes"}, (("connection", "close"),))


class Door:
    """One port of this process."""

    def __init__(self, here: Surroundings, host: str, port: int) -> None:
        self._bus = here.bus
        self._subjects = here.subjects
        self._place = (host, port)
        self.endpoints: dict[str, Endpoint] = {}
        self._known: dict[str, None] = {}
        """Paths that somebody had: for those 404 would be wrong while an agent moves."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening = asyncio.Lock()
        self._is_open = False
        self._server: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_broken(self) -> bool:
        """Whether its endpoints must look for another."""
        return self._broken.done()

    async def broken(self) -> None:
        """Wait until it can't serve any more.

        Raises:
            SensorError, ConfigError: says why.
        """
        await asyncio.shield(self._broken)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something until the door is closed."""
        task = asyncio.get_running_loop().create_task(coroutine, name="sensor.door")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- open and close -------------------------------------------------------------

    async def open(self) -> None:
        """Listen, or find that another process of the cluster does.

        Raises:
            ConfigError: another program has the port.
            SensorError: it can't be listened at.
        """
        async with self._opening:
            if self._is_open:
                return
            if not await self._listen():
                self.start(self._listen_later())
            self._is_open = True

    async def _listen(self) -> bool:
        """Whether this process has the port now."""
        try:
            listener = _listener(*self._place)
        except OSError as error:
            host, port = self._place
            if error.errno != errno.EADDRINUSE:
                raise SensorError(f"Can't listen at {host}:{port}: {error.strerror}.") from error
            found = await _who_listens(host, port)
            if found == self._subjects.cluster:
                return False
            who = "Another program" if found is None else f"The cluster {found}"
            raise ConfigError(
                f"Can't listen at {host}:{port}: {who} has the port.", hint="Choose another one."
            ) from error
        self._server = quiet_server(self._app, lifespan="off")
        self.start(self._serve(listener))
        for _ in range(int(_START_S / 0.01)):
            if self._server.started or self.is_broken:
                break
            await asyncio.sleep(0.01)
        return True

    async def _listen_later(self) -> None:
        while True:
            await asyncio.sleep(_LISTEN_AGAIN_S * random.uniform(0.75, 1.25))
            try:
                if await self._listen():
                    return
            except FoundationError as error:
                self._break(error)
                return

    async def _serve(self, listener: socket.socket) -> None:
        try:
            await self._server.serve(sockets=[listener])
            error: Exception | None = None
        except Exception as found:  # its endpoints learn of it by `broken`
            error = found
        finally:
            listener.close()
        self._break(SensorError(f"The server of port {self._place[1]} has ended: {error}"))

    def _break(self, error: FoundationError) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
            self._broken.exception()  # perhaps nobody waits any more

    async def close(self) -> None:
        """End it; requests in hand are answered, briefly."""
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.wait(list(self._tasks), timeout=3.0)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=1.0)

    # ---- requests ---------------------------------------------------------------------

    async def _app(self, scope: Parts, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = await self._answer(scope, receive)
        body = orjson.dumps(answer.body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (_GREETING, self._subjects.cluster.encode()),
            *((name.encode(), value.encode()) for name, value in answer.headers),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Parts, receive: Receive) -> Answer:
        path = scope["path"]
        if path == _PROBE:
            return Answer(200, {"cluster": self._subjects.cluster})
        endpoint = self.endpoints.get(path)
        limit = BYTES_MAX if endpoint is None else endpoint.bytes_max
        body = b""
        while True:
            part = await receive()
            if part["type"] == "http.disconnect":
                return Answer(400, {"error": "the body is not complete"})
            body += part.get("body", b"")
            if len(body) > limit:
                return too_large(limit)
            if not part.get("more_body"):
                break
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        query = scope["query_string"].decode("latin-1")
        request = Request(scope["method"], path, query, headers, body)
        if endpoint is None:
            return await self._pass_on(request)
        return await endpoint.answer(request)

    async def _pass_on(self, request: Request) -> Answer:
        subject = self._subjects.web(self._place[1], request.path)
        try:
            reply = await self._bus.request(subject, _encoded(request), timeout=_FORWARD_S)
            said = orjson.loads(reply.data)
        except NoRespondersError:
            if request.path in self._known:
                return unavailable("its agent does not run now")
            return Answer(404, {"error": "no agent has this path"})
        except BusError as error:
            return unavailable(f"not known to be stored: {error}")
        self._remember(request.path)
        return Answer(said["status"], said["body"], tuple(map(tuple, said["headers"])))

    def _remember(self, path: str) -> None:
        self._known[path] = None
        if len(self._known) > _KNOWN_MAX:
            del self._known[next(iter(self._known))]

    # ---- endpoints ----------------------------------------------------------------------

    @contextlib.contextmanager
    def behind(self, endpoint: Endpoint, here: Surroundings) -> Iterator[None]:
        """Have *endpoint* answer what comes to its path, here and at the other doors of this port.

        Raises:
            SensorError: another agent of this process has the path.
        """
        taken = self.endpoints.get(endpoint.path)
        if taken is not None:
            raise SensorError(
                f"{endpoint.path} of port {self._place[1]} is taken by agent {taken.owner}.",
                hint="Write {agent} into the path.",
            )

        def on_message(message: Message) -> None:
            if len(self._tasks) < _HAND_MAX:
                self.start(self._answer_message(endpoint, here, message))
            else:
                self._reply(message, unavailable("too much to do"))

        self.endpoints[endpoint.path] = endpoint
        self._remember(endpoint.path)
        route = self._bus.subscribe(self._subjects.web(self._place[1], endpoint.path), on_message)
        try:
            yield
        finally:
            self._bus.unsubscribe(route)
            if self.endpoints.get(endpoint.path) is endpoint:
                del self.endpoints[endpoint.path]

    async def _answer_message(
        self, endpoint: Endpoint, here: Surroundings, message: Message
    ) -> None:
        if not here.is_valid:
            # Perhaps replaced: then its successor has heard it too, and answers first.
            await asyncio.sleep(_DOUBT_S)
        if here.is_valid:
            answer = await endpoint.answer(_decoded(message.data))
        else:
            answer = unavailable("nothing can be stored now")
        self._reply(message, answer)

    def _reply(self, message: Message, answer: Answer) -> None:
        said = {"status": answer.status, "body": answer.body, "headers": answer.headers}
        with contextlib.suppress(BusError):
            self._bus.publish(message.reply, orjson.dumps(said))


def _encoded(request: Request) -> bytes:
    return orjson.dumps(
        {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "headers": request.headers,
            "body": base64.b64encode(request.body).decode(),
        }
    )


def _decoded(data: bytes) -> Request:
    found = orjson.loads(data)
    return Request(
        found["method"],
        found["path"],
        found["query"],
        found["headers"],
        base64.b64decode(found["body"]),
    )


_doors: dict[tuple[Any, str, int], Door] = {}
"""Those of this process, by connection and place."""


@contextlib.asynccontextmanager
async def serving(
    here: Surroundings, host: str, port: int, endpoint: Endpoint
) -> AsyncIterator[Door]:
    """Have *endpoint* served while the block runs.

    Raises:
        ConfigError: another program has the port.
        SensorError: another agent has the path, or the place can't be listened at.
    """
    place = here.bus, host, port
    door = _doors.get(place)
    if door is None or door.is_broken:
        door = _doors[place] = Door(here, host, port)
    try:
        with door.behind(endpoint, here):
            await door.open()
            yield door
    finally:
        if not door.endpoints:
            if _doors.get(place) is door:
                del _doors[place]
            await asyncio.shield(door.close())


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def _who_listens(host: str, port: int) -> str | None:
    """The cluster whose door has the port; None: it is no door."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  not bound here
    found = b""
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(_LOOK_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    b"GET " + _PROBE.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                )
                found = await reader.read(4096)
            finally:
                writer.close()
    for line in found.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == _GREETING:
            return value.strip().decode("latin-1")
    return None


__all__ = ["Answer", "Door", "Endpoint", "Request", "serving", "unavailable"]
