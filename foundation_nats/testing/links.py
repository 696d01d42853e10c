"""A TCP link to a server that a test can cut, hold, delay, choke and heal.

IO: listens on a free loopback port and forwards to the target, bytes in order.

A cut link closes its connections and refuses new ones, as a dead host does that
still answers; a held one stays silent with its connections open, as a broken
network does. Both directions can be held and delayed on their own: ``up`` is
from client to server, ``down`` from server to client. The port stays ours while
the link is cut. What was under way in a connection that is cut is lost; what is
held is delivered at `Link.release`. A choked link reads so slowly that whoever writes into
it has to wait, as a slow consumer does. A link opened with *mangles* can also drop,
double and swap live copies on their way to the client (`Link.mangle`).

Not guaranteed: the proxy and the kernel buffer some bytes of a held direction,
so a writer notices back-pressure late.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from foundation_nats.testing.mangling import Mangler, Mangling

Direction = Literal["both", "up", "down"]
Dial = Callable[[str, int], Awaitable[socket.socket]]
"""Makes a connected socket, for targets that can't be reached from here."""

_CHUNK = 16 * 1024
_CHUNKS_MAX = 1024
_BACKLOG = 128
_DIAL_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
_SIP_S = 0.05
"""How much of a second a choked lane passes on at once."""


@dataclass(slots=True)
class _Lane:
    """One direction, for all connections."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    rate: float | None = None
    """Bytes per second, of all connections together; None: as they come."""
    free_at: float = 0.0

    def __post_init__(self) -> None:
        self.open.set()

    def sip(self) -> int:
        """How much may be read at once."""
        return _CHUNK if self.rate is None else max(1, min(_CHUNK, int(self.rate * _SIP_S)))

    async def pace(self, size: int) -> None:
        """Wait until *size* bytes have gone through the narrow place; at once where there is none."""
        if self.rate is None:
            return
        loop = asyncio.get_running_loop()
        self.free_at = due = max(self.free_at, loop.time()) + size / self.rate
        # In slices, so that a lane that is healed is free at once.
        while self.rate is not None and (left := due - loop.time()) > 0:
            await asyncio.sleep(min(left, _SIP_S))


class Link:
    """A proxy in front of one server; also an async context manager."""

    def __init__(self, target_host: str, target_port: int, listener: socket.socket) -> None:
        self._target = (target_host, target_port)
        self._socket = listener
        self._address: tuple[str, int] = listener.getsockname()
        self._lanes = {"up": _Lane(), "down": _Lane()}
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = True
        self._is_closed = False
        self._mangles: random.Random | None = None
        self._dial: Dial | None = None
        self._mangling: Mangling | None = None
        self._manglers: list[Mangler] = []

    @classmethod
    async def open(
        cls,
        target_host: str,
        target_port: int,
        *,
        mangles: random.Random | None = None,
        dial: Dial | None = None,
    ) -> Self:
        """A link that forwards to the target; the target need not be there yet.

        Args:
            mangles: take the stream apart into messages, so that `mangle` works; its choices.
            dial: how to connect to the target, where it is in another network.
        """
        link = cls(target_host, target_port, _bound("127.0.0.1", 0))
        link._mangles = mangles
        link._dial = dial
        link._listen()
        return link

    @property
    def url(self) -> str:
        """Where clients connect instead of to the server."""
        return f"nats://{self.host}:{self.port}"

    @property
    def host(self) -> str:
        """The address it listens on."""
        return self._address[0]

    @property
    def port(self) -> int:
        """The port it listens on; the same for its whole life."""
        return self._address[1]

    @property
    def connections(self) -> int:
        """How many connections go through it now."""
        return len(self._pipes)

    def cut(self) -> None:
        """Close all connections, lose what is under way, and refuse new ones until `heal`."""
        if self._is_cut:
            return
        self._is_cut = True
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        # Bound but not listening: connecting is refused, and nobody else gets the port.
        self._socket = _bound(self.host, self.port)
        self._drop()

    def hold(self, direction: Direction = "both") -> None:
        """Forward nothing, silently; connections stay open."""
        for lane in self._chosen(direction):
            lane.open.clear()

    def release(self, direction: Direction = "both") -> None:
        """Forward again, beginning with what was held."""
        for lane in self._chosen(direction):
            lane.open.set()

    def delay(self, seconds: float, direction: Direction = "both") -> None:
        """Deliver what comes from now on *seconds* later; 0 ends it."""
        if seconds < 0:
            raise ValueError(f"a delay can't be negative: {seconds}")
        for lane in self._chosen(direction):
            lane.delay = seconds

    def choke(self, bytes_per_s: float | None, direction: Direction = "both") -> None:
        """Read only so many bytes a second, of all connections together; None ends it.

        The writer at the other end is held up by TCP once the buffers between are full.
        """
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"a rate must be positive: {bytes_per_s} (`hold` lets nothing pass)")
        for lane in self._chosen(direction):
            lane.rate = bytes_per_s
            lane.free_at = 0.0

    def mangle(self, mangling: Mangling | None) -> None:
        """Mangle live copies on their way to the client from now on; None ends it."""
        if self._mangles is None:
            raise RuntimeError("open the link with mangles=Random(…) first")
        self._mangling = mangling

    @property
    def mangled(self) -> int:
        """How many messages were dropped, doubled or swapped."""
        return sum(mangler.touched for mangler in self._manglers)

    def heal(self) -> None:
        """Undo `cut`, `hold`, `delay`, `choke` and `mangle`."""
        if self._is_closed:
            raise RuntimeError("the link is closed")
        self._mangling = None
        self.release()
        self.delay(0)
        self.choke(None)
        if self._is_cut:
            self._listen()

    async def close(self) -> None:
        """End all connections and give the port back; idempotent."""
        self._is_closed = True
        self.cut()
        self._socket.close()
        pipes = list(self._pipes)
        if pipes:
            await asyncio.wait(pipes, timeout=_CLOSE_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- inside -----------------------------------------------------------------

    def _chosen(self, direction: Direction) -> list[_Lane]:
        if direction == "both":
            return list(self._lanes.values())
        if direction not in self._lanes:
            raise ValueError(f"a direction is 'both', 'up' or 'down', not {direction!r}")
        return [self._lanes[direction]]

    def _listen(self) -> None:
        self._socket.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self._is_cut = False

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # the client has gone again
        client.setblocking(False)
        pipe = asyncio.get_running_loop().create_task(self._pipe(client), name="link.pipe")
        self._pipes.add(pipe)
        pipe.add_done_callback(self._pipes.discard)
        # Cancelled before its first step, the task could not close it.
        pipe.add_done_callback(lambda _: client.close())

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        for pipe in self._pipes:
            pipe.cancel()

    async def _pipe(self, client: socket.socket) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            from_client, to_client = await asyncio.open_connection(sock=client)
            self._add(to_client, writers)
            # A connection attempt is traffic from the client, too.
            await self._lanes["up"].open.wait()
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                from_server, to_server = await self._connect()
            self._add(to_server, writers)
            async with asyncio.TaskGroup() as group:
                group.create_task(_forward(from_client, to_server, self._lanes["up"]))
                group.create_task(
                    _forward(from_server, to_client, self._lanes["down"], self._new_mangler())
                )
        except* OSError:
            pass  # one end is gone (or never came), and so is the connection
        finally:
            self._writers.difference_update(writers)
            for writer in writers:
                writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._dial is None:
            return await asyncio.open_connection(*self._target)
        return await asyncio.open_connection(sock=await self._dial(*self._target))

    def _new_mangler(self) -> Mangler | None:
        if self._mangles is None:
            return None
        mangler = Mangler(
            lambda: self._mangling, lambda subject: subject.endswith(".live"), self._mangles
        )
        self._manglers.append(mangler)
        return mangler

    def _add(self, writer: asyncio.StreamWriter, writers: list[asyncio.StreamWriter]) -> None:
        writers.append(writer)
        self._writers.add(writer)


async def _forward(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    lane: _Lane,
    mangler: Mangler | None = None,
) -> None:
    """Bytes and the end from one side to the other, each `lane.delay` after it came."""
    # Reading and writing are apart, so that a delay is latency and does not cost throughput.
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_MAX)
    async with asyncio.TaskGroup() as group:
        group.create_task(_take(reader, under_way, lane, mangler))
        group.create_task(_deliver(under_way, writer, lane))


async def _take(
    reader: asyncio.StreamReader,
    under_way: asyncio.Queue[tuple[float, bytes]],
    lane: _Lane,
    mangler: Mangler | None,
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await lane.open.wait()
        data = await reader.read(lane.sip())
        await lane.pace(len(data))
        if data and mangler is not None:
            data = mangler.feed(data)
            if not data:
                continue
        await under_way.put((loop.time() + lane.delay, data))
        if not data:
            return


async def _deliver(
    under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, lane: _Lane
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, data = await under_way.get()
        left = due - loop.time()
        if left > 0:
            await asyncio.sleep(left)
        await lane.open.wait()
        if not data:
            with contextlib.suppress(OSError, RuntimeError):  # it may be closed already
                writer.write_eof()
            return
        try:
            writer.write(data)
            await writer.drain()
        except RuntimeError as error:  # uvloop's word for a connection that was aborted
            raise ConnectionResetError(str(error)) from error


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
