"""`Web`: an ASGI application on one address of this process, served by uvicorn, until it is closed.

On anything but this machine's own addresses it wants a token, so that nobody opens a cluster to a network
by a slip of an option; TLS is for what stands in front.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from foundation_nats.base.asgi import quiet_server
from foundation_nats.base.tasks import TaskScope
from foundation_nats.errors import ConfigError, FoundationError

Parts = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application."""

_START_S = 10.0
BODY_MAX = 4 * 1024 * 1024
"""Bytes of a request's body."""
_DRAINED_MAX = 64 * 1024


def missing(extra: str, error: ImportError) -> ConfigError:
    """The error for an extra that is not installed."""
    name = error.name or str(error)
    return ConfigError(
        f"This needs {name.partition('.')[0]}, which is not installed.",
        hint=f"pip install 'foundation-nats[{extra}]'",
    )


def read_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``:PORT`` or ``PORT``; port 0: any that is free.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:8080.")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Web:
    """One application on one address."""

    def __init__(self, app: App, address: tuple[str, int], *, token: str | None) -> None:
        """*token*: what requests must bring as ``Authorization: Bearer …``; None: nothing.

        Raises:
            ConfigError: the address is open to others, and there is no token.
        """
        if token is None and not is_loopback(address[0]):
            raise ConfigError(
                f"{address[0]} is reachable from other machines: that needs a token.",
                hint="Set FOUNDATION_GATEWAY_TOKEN, or listen on 127.0.0.1.",
            )
        self._app = _guarded(app, token)
        self._host, self._port = address
        self._server: Any = None
        self._scope: TaskScope | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def open(self) -> None:
        """Listen, and serve until `close`.

        Raises:
            ConfigError: the address can't be listened at; says why.
        """
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
        except OSError as error:
            raise ConfigError(f"Can't listen at {self.url}: {error.strerror or error}.") from error
        self._port = int(listener.getsockname()[1])
        self._server = quiet_server(self._app, lifespan="on")
        self._scope = TaskScope("web")
        self._serving = self._scope.start(self._server.serve(sockets=[listener]), "serve")
        for _ in range(int(_START_S / 0.01)):
            if self._server.started or self._serving.done():
                break
            await asyncio.sleep(0.01)
        if not self._server.started:
            raise FoundationError(f"Nothing could be served at {self.url}.")

    async def close(self) -> None:
        """End it; requests in hand are answered, briefly. Idempotent."""
        if self._server is not None:
            self._server.should_exit = True
        if self._scope is not None:
            if self._serving is not None:
                await asyncio.wait({self._serving}, timeout=4.0)
            await self._scope.close()


def _guarded(app: App, token: str | None) -> App:
    wanted = None if token is None else f"Bearer {token}".encode()

    async def guarded(scope: Parts, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            given = headers.get(b"authorization", b"")
            if wanted is not None and not hmac.compare_digest(given, wanted):
                await _refuse(receive, send, 401, b"unauthorized", (b"www-authenticate", b"Bearer"))
                return
            length = headers.get(b"content-length", b"")
            if b"transfer-encoding" in headers and not length:
                await _refuse(receive, send, 411, b"say how long the body is")
                return
            if length.isdigit() and int(length) > BODY_MAX:
                await _refuse(receive, send, 413, b"the body is too large")
                return
        await app(scope, receive, send)

    return guarded


async def _refuse(
    receive: Any, send: Any, status: int, why: bytes, *more: tuple[bytes, bytes]
) -> None:
    # Who is still sending would see a broken connection instead of the answer.
    left, is_more = _DRAINED_MAX, True
    while is_more and left > 0:
        part = await receive()
        left -= len(part.get("body", b"")) or 1
        is_more = bool(part.get("more_body", False))
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error":"%b"}' % why})


__all__ = ["Web", "is_loopback", "missing", "read_address"]
