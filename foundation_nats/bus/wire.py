"""The nats-py client as we drive it: many subjects behind light routes, and pipelined publishing.

nats-py gives every subscription a task and a queue (4.7 KB), parses every line
with a row of regular expressions, and the headers of every message. Here a
subscription is a `Route` of a few slots whose handler runs inside the read
loop, and headers stay bytes until somebody asks.

Facts relied upon, verified against nats-py 2.16.0 and nats-server 2.15.1:

- ``Client._read_loop`` feeds ``Client._ps.parse`` with what was read;
  ``Client._subs`` is replayed on reconnect from the attributes ``_subject``,
  ``_queue``, ``_max_msgs`` and ``_received`` of its values.
- What waits in ``Client._pending`` at a disconnect is sent after the reconnect,
  even if its sender has long given up; `forget_pending` prevents that.
- A payload that exceeds ``max_payload`` only by its headers closes the
  connection for good (F5); `Bus` checks both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from nats import errors
from nats.aio.client import Client, Srv
from nats.protocol.parser import Parser

from foundation_nats.base.logs import get_logger

_M, _H = ord("M"), ord("H")


class Message:
    """One message as it came off the wire; headers are parsed on demand."""

    __slots__ = ("data", "raw_headers", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, raw_headers: bytes | None) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self.raw_headers = raw_headers

    @property
    def status(self) -> int:
        """The inline status (404, 503 …); 0 for an ordinary message."""
        raw = self.raw_headers
        if raw is None or len(raw) < 12 or raw[8:9] != b" ":
            return 0
        digits = raw[9:12]
        return int(digits) if digits.isdigit() else 0

    @property
    def status_text(self) -> str:
        """The text after the inline status."""
        raw = self.raw_headers or b""
        return raw[12:].split(b"\r\n", 1)[0].strip().decode("utf-8", "replace")

    def header(self, name: bytes) -> bytes | None:
        """The value of header *name*, spelled as the server spells it."""
        raw = self.raw_headers
        if raw is None:
            return None
        start = raw.find(b"\r\n" + name + b":")
        if start < 0:
            return None
        start += len(name) + 3
        end = raw.find(b"\r\n", start)
        return raw[start:end].strip()

    def headers(self) -> dict[str, str]:
        """All headers; of repeated ones the last."""
        found: dict[str, str] = {}
        for line in (self.raw_headers or b"").split(b"\r\n")[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                found[name.decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
        return found


Handler = Callable[[Message], None]


class Route:
    """A subscription: a subject and a handler that must not block."""

    __slots__ = ("_queue", "_subject", "handler", "sid")

    # What nats-py looks at when it reconnects or closes.
    _max_msgs = 0
    _received = 0
    _wait_for_msgs_task = None
    _message_iterator = None
    _pending_next_msgs_calls = None
    _jsi = None

    def __init__(self, subject: str, handler: Handler, queue: str = "") -> None:
        self._subject = subject
        self._queue = queue
        self.handler = handler
        self.sid = 0


def _nobody(_message: Message) -> None:
    """The handler of a route that was removed."""


class _WireParser(Parser):
    """Reads messages off the wire without regular expressions; leaves the rest to nats-py's parser."""

    def __init__(self, client: WireClient) -> None:
        self._resets = 0
        super().__init__(client)

    def reset(self) -> None:
        """Forget what is half read: the connection is a new one."""
        self._resets += 1
        super().reset()

    async def parse(self, data: bytes = b"") -> None:
        """Dispatch every complete message in *data*; keep the rest for the next call."""
        if self.buf:
            data = bytes(self.buf) + data
        dispatch = self.nc.dispatch
        resets = self._resets
        position, size = 0, len(data)
        while position < size:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                break
            first = data[position]
            # MSG <subject> <sid> [reply] <size> and HMSG … [reply] <header size> <size>
            if first in (_M, _H):
                words = data[position:line_end].split()
                start = line_end + 2
                end = start + int(words[-1])
                if end + 2 > size:
                    break
                if first == _M:
                    reply = words[3] if len(words) == 5 else b""
                    dispatch(int(words[2]), words[1], reply, data[start:end], None)
                else:
                    reply = words[3] if len(words) == 6 else b""
                    split = start + int(words[-2])
                    dispatch(int(words[2]), words[1], reply, data[split:end], data[start:split])
                position = end + 2
            else:
                self.buf = bytearray(data[position : line_end + 2])
                await super().parse()
                if self._resets != resets:
                    return
                position = line_end + 2
        self.buf = bytearray(data[position:])


class WireClient(Client):
    """nats-py's client with direct dispatch and raw publishing."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _WireParser(self)
        self.needs_tls = False
        """Speak to no server in plain text."""

    async def _connect_to_server(self, s: Srv) -> None:
        # nats-py forgets the connection of an attempt that failed after it was made: with a server
        # that is ending, one that is never closed for each attempt.
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py encrypts if the server requires it, and else says who it is in plain text.
        server = self._current_server
        if initial_connection and self.needs_tls and server and server.uri.scheme != "wss":
            if info.get("tls_available") and server.uri.scheme != "ws":
                info["tls_required"] = True
            elif not info.get("tls_required") or server.uri.scheme == "ws":
                raise errors.Error("TLS is asked for, and the server offers none")
        await super()._process_info(info, initial_connection)

    def _connect_command(self) -> bytes:
        # nats-py makes an encrypted stream by hand and doesn't tell its protocol, which then logs
        # a warning at the end of every connection.
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.get_extra_info("sslcontext") is not None:
            writer._protocol._over_ssl = True
        return super()._connect_command()

    def dispatch(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        """Hand a message to its route; messages of forgotten routes are dropped."""
        route: object = self._subs.get(sid)
        if type(route) is Route:
            message = Message(
                subject.decode("utf-8", "replace"),
                reply.decode("utf-8", "replace") if reply else "",
                data,
                headers,
            )
            try:
                route.handler(message)
            except Exception as error:  # it would end nats-py's read loop in silence
                get_logger("bus").error(
                    "message handler failed", subject=message.subject, exc_info=error
                )

    def add_route(self, route: Route) -> None:
        """Register interest; sent now if connected, and again at every reconnect."""
        self._sid += 1
        route.sid = self._sid
        self._subs[route.sid] = route  # type: ignore[assignment]
        if self.is_connected:
            self.write(
                f"SUB {route._subject} {route._queue} {route.sid}\r\n".encode()
                if route._queue
                else f"SUB {route._subject} {route.sid}\r\n".encode()
            )

    def remove_route(self, route: Route) -> None:
        """End interest; the handler is let go, so that a circle through its owner's route frees at once."""
        route.handler = _nobody
        if self._subs.pop(route.sid, None) is not None and self.is_connected:
            self.write(f"UNSUB {route.sid}\r\n".encode())

    def write(self, command: bytes) -> None:
        """Queue one protocol command; one flush sends all that were queued in this turn."""
        self._pending.append(command)
        self._pending_data_size += len(command)
        queue = self._flush_queue
        if queue is not None and queue.empty():
            queue.put_nowait(asyncio.get_running_loop().create_future())

    def offer_servers(self, urls: Sequence[str]) -> None:
        """Try *urls* from the next attempt on, besides what servers have said of each other.

        Not nats-py's ``set_server_pool``: that forgets which servers were learnt
        from others, and calls the first of the new ones the connected one.
        """
        known = {server.uri.netloc: server for server in self._server_pool}
        pool: dict[str, Srv] = {}
        for url in urls:
            uri = self._parse_server_uri(url)
            pool.setdefault(uri.netloc, known.get(uri.netloc) or Srv(uri))
        for server in self._server_pool:
            if server.discovered:
                pool.setdefault(server.uri.netloc, server)
        if pool:
            self._server_pool = list(pool.values())

    async def _process_pong(self) -> None:
        # A flush that timed out has left its future behind, cancelled; to resolve that one
        # raises, which ends nats-py's read loop: the connection would be deaf from then on.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    def forget_pending(self) -> None:
        """Drop what was queued but not sent."""
        self._pending = []
        self._pending_data_size = 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes queued and not yet handed to the socket."""
        size: int = self._pending_data_size
        return size

    @property
    def server_facts(self) -> dict[str, Any]:
        """The server's INFO."""
        facts: dict[str, Any] = self._server_info or {}
        return facts
