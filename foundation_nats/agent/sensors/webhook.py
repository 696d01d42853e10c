"""`Webhook`: an HTTP endpoint whose requests become durable signals, and the servers that endpoints share.

202 means that the signal is stored: it takes effect once, or is found among the dead letters. 503 means that
it could not be stored now, or that this is not known: to send it again is right, and harmless if the sender
marks its requests (`id_header`).

The endpoint is there while the agent runs on that worker, and moves with it: put whatever balances load in
front of all nodes, with a retry on errors. Served by uvicorn, which is behind the extra ``web``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

import orjson

from foundation_nats.agent.sensors.http import read_body
from foundation_nats.agent.sensors.sensor import Emit, Event, Sensor, needs
from foundation_nats.base.logs import get_logger
from foundation_nats.errors import ConfigError, FoundationError, PayloadTooLargeError, SensorError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_START_S = 10.0
_ID_MAX = 200
_RETRY_AFTER_S = 1


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
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handle = Callable[[Request], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class _Endpoint:
    owner: str
    methods: frozenset[str]
    bytes_max: int
    handle: Handle


class Webhook(Sensor):
    """``Webhook("/orders", port=8080, emit="order.placed")``: the data is the body: JSON, or text.

    Answers: 202 ``{"id": …}`` once the signal is stored; 400 a body that is not what it says; 401 a wrong
    signature; 404, 405; 413 too large; 503 try again. Endpoints of one worker share a server by path; a
    port that another process has is a failure, tried again with pauses, so give each worker of a
    node its own, or run one.

    Args:
        path: ``{agent}`` in it is the agent's name.
        port: to listen on; ``{"port": …}`` of the agent's config goes before it if `port` is None.
        host: to listen at; all addresses: ``0.0.0.0``.
        secret: of an HMAC-SHA256 over the body, in hex, which the request must carry;
            ``env:NAME`` reads it from the worker's environment, ``config:NAME`` from the agent's config.
        signature_header: where it is; a prefix such as ``sha256=`` may be before it.
        id_header: which header tells requests apart; a repeat takes no effect
            (within `mailbox.duplicate_window_s`), and is answered 202.
        whole: the data is ``{"method", "path", "query", "headers", "body"}``.
        bytes_max: a longer body is refused by 413.
        timeout: seconds after which the answer is 503.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        path: str,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        methods: tuple[str, ...] = ("POST",),
        secret: str | None = None,
        signature_header: str = "X-Hub-Signature-256",
        id_header: str = "Idempotency-Key",
        whole: bool = False,
        bytes_max: int = 64 * 1024,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not path.startswith("/"):
            raise ConfigError(f"Webhook {self.name}: the path {path!r} must begin with /")
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"Webhook {self.name}: {port} is no port")
        if secret is not None and not secret:
            raise ConfigError(f"Webhook {self.name}: the secret is empty")
        if bytes_max < 1 or timeout <= 0:
            raise ConfigError(f"Webhook {self.name}: bytes_max and timeout must be positive")
        self.path = path
        self.port = port
        self.host = host
        self.methods = frozenset(method.upper() for method in methods)
        self.secret = secret
        self.signature_header = signature_header.lower()
        self.id_header = id_header.lower()
        self.whole = whole
        self.bytes_max = bytes_max
        self.timeout = timeout

    def check(self) -> None:
        try:
            import uvicorn  # noqa: F401
        except ImportError:
            raise needs("uvicorn", "web", "Webhook") from None

    async def run(self, emit: Emit) -> None:
        port = self.port if self.port is not None else self.here.config.get("port")
        if not isinstance(port, int):
            raise ConfigError(f"Webhook {self.name}: give a port, or the agent a config.port")
        path = self.path.replace("{agent}", self.here.id)
        secret = self._secret()

        async def handle(request: Request) -> Answer:
            return await self._handle(emit, secret, request)

        endpoint = _Endpoint(self.here.id, self.methods, self.bytes_max, handle)
        async with _serving(self.host, port, path, endpoint) as failed:
            await failed.wait()
        raise SensorError(f"The server of port {port} has ended.")

    def _secret(self) -> bytes | None:
        if self.secret is None:
            return None
        kind, _, name = self.secret.partition(":")
        found: Any = self.secret
        if kind == "env":
            found = os.environ.get(name)
        elif kind == "config":
            found = self.here.config.get(name)
        if not found:
            raise ConfigError(f"Webhook {self.name}: its secret {self.secret} is not set")
        return str(found).encode()

    async def _handle(self, emit: Emit, secret: bytes | None, request: Request) -> Answer:
        if secret is not None and not self._is_signed(secret, request):
            return Answer(401, {"error": f"the signature in {self.signature_header} is not right"})
        try:
            data = read_body(request.body, request.headers.get("content-type", ""))
        except SensorError as error:
            return Answer(400, {"error": str(error)})
        if self.whole:
            data = {
                "method": request.method,
                "path": request.path,
                "query": dict(parse_qsl(request.query, keep_blank_values=True)),
                "headers": request.headers,
                "body": data,
            }
        given = request.headers.get(self.id_header)
        if given is not None and len(given) > _ID_MAX:
            return Answer(400, {"error": f"{self.id_header} is longer than {_ID_MAX}"})
        if emit.is_full or not self.here.is_valid:
            return _unavailable("nothing can be stored now")
        traceparent = request.headers.get("traceparent")
        try:
            async with asyncio.timeout(self.timeout):
                stored = await emit.soon(Event(data, id=given, traceparent=traceparent))
                return Answer(202, {"id": await stored})
        except TimeoutError:
            return _unavailable("not known to be stored in time")
        except PayloadTooLargeError as error:
            return Answer(413, {"error": str(error)})
        except FoundationError as error:
            return _unavailable(str(error))

    def _is_signed(self, secret: bytes, request: Request) -> bool:
        given = request.headers.get(self.signature_header, "").rpartition("=")[2].strip()
        wanted = hmac.new(secret, request.body, sha256).hexdigest()
        return hmac.compare_digest(given.lower().encode(), wanted.encode())


def _unavailable(why: str) -> Answer:
    return Answer(503, {"error": why}, ((b"retry-after", str(_RETRY_AFTER_S).encode()),))


# ---- the servers of this process ------------------------------------------------------


class _Server:
    """One port, and the endpoints behind it."""

    def __init__(self, host: str, port: int) -> None:
        self._place = (host, port)
        self.endpoints: dict[str, _Endpoint] = {}
        self.ended = asyncio.Event()
        self._starting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._server: Any = None

    async def start(self) -> None:
        """Listen, unless it does already.

        Raises:
            SensorError: it can't; says why.
        """
        async with self._starting:
            if self._task is not None:
                return
            listener = _listen(*self._place)
            self._server = _uvicorn(self._app)
            self._task = asyncio.get_running_loop().create_task(self._serve(listener))
            for _ in range(int(_START_S / 0.01)):
                if self._server.started or self.ended.is_set():
                    break
                await asyncio.sleep(0.01)

    async def _serve(self, listener: socket.socket) -> None:
        try:
            await self._server.serve(sockets=[listener])
        except Exception as error:  # its endpoints learn of it by `ended`
            get_logger("sensors").error("web server failed", exc_info=error)
        finally:
            self.ended.set()
            listener.close()

    async def stop(self) -> None:
        """Let requests in hand end, briefly."""
        if self._task is None:
            return
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=3.0)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)

    async def _app(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = await self._answer(scope, receive)
        body = orjson.dumps(answer.body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *answer.headers,
        ]
        if answer.status == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Message, receive: Receive) -> Answer:
        endpoint = self.endpoints.get(scope["path"])
        if endpoint is None:
            return Answer(404, {"error": "no agent here listens on this path"})
        if scope["method"] not in endpoint.methods:
            allowed = ", ".join(sorted(endpoint.methods))
            return Answer(405, {"error": f"use {allowed}"}, ((b"allow", allowed.encode()),))
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        body = b""
        while True:
            part = await receive()
            if part["type"] == "http.disconnect":
                return Answer(400, {"error": "the body is not complete"})
            body += part.get("body", b"")
            if len(body) > endpoint.bytes_max:
                said = f"the body may have {endpoint.bytes_max:,} bytes"
                return Answer(413, {"error": said})
            if not part.get("more_body"):
                break
        request = Request(
            scope["method"], scope["path"], scope["query_string"].decode("latin-1"), headers, body
        )
        try:
            return await endpoint.handle(request)
        except Exception as error:  # else the sender would wait for an answer
            get_logger("sensors").error("webhook failed", agent=endpoint.owner, exc_info=error)
            return _unavailable("it failed")


_servers: dict[tuple[str, int], _Server] = {}
"""Those of this process."""


@contextlib.asynccontextmanager
async def _serving(host: str, port: int, path: str, endpoint: _Endpoint) -> Any:
    """Have *endpoint* served while the block runs; gives the event that its server has ended.

    Raises:
        SensorError: the path or the port is taken, or can't be listened on.
    """
    place = host, port
    server = _servers.get(place)
    if server is None or server.ended.is_set():
        server = _servers[place] = _Server(host, port)
    if path in server.endpoints:
        raise SensorError(
            f"{path} of port {port} is taken by agent {server.endpoints[path].owner}: "
            "write {agent} into the path."
        )
    server.endpoints[path] = endpoint
    try:
        await server.start()
        yield server.ended
    finally:
        if server.endpoints.get(path) is endpoint:
            del server.endpoints[path]
        if not server.endpoints:
            if _servers.get(place) is server:
                del _servers[place]
            await asyncio.shield(server.stop())


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SensorError(
            f"Can't listen at {host}:{port}: {error.strerror or error}. Another process, or another "
            "worker of this node, may have the port.",
            hint="Choose another port, or run one worker on nodes with webhooks.",
        ) from error
    return listener


def _uvicorn(app: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # The worker has its own handlers.
            yield

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            interface="asgi3",
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=512,
        )
    )


__all__ = ["Answer", "Request", "Webhook"]
