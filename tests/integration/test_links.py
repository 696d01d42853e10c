"""Links that are cut, held, delayed and healed, with an echo and with a real server behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from foundation_nats.errors import ServerError
from foundation_nats.node.embedded import EmbeddedServer, probe_server
from foundation_nats.testing.links import Link

_SILENCE_S = 0.15


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for *condition*, at most *timeout* seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


class Echo:
    """A server that says what it hears, and counts it."""

    def __init__(self) -> None:
        self.heard = b""
        self.ends = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            self.ends += 1
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    """An echo on a free port."""
    found = Echo()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    async with server:
        found.port = server.sockets[0].getsockname()[1]
        yield found


@pytest.fixture
async def link(echo: Echo) -> AsyncIterator[Link]:
    """A link in front of the echo."""
    async with await Link.open("127.0.0.1", echo.port) as opened:
        yield opened


@contextlib.asynccontextmanager
async def connection(
    link: Link,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's connection through the link."""
    reader, writer = await asyncio.open_connection(link.host, link.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read(reader: asyncio.StreamReader, size: int) -> bytes:
    """Exactly *size* bytes, in time."""
    async with asyncio.timeout(5):
        return await reader.readexactly(size)


async def stays_silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing comes for a while, the end of the connection included."""
    try:
        async with asyncio.timeout(_SILENCE_S):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_in_both_directions(link: Link) -> None:
    """Many, in order, whole."""
    sent = bytes(range(256)) * 4096
    async with connection(link) as (reader, writer):
        writer.write(sent)
        assert await read(reader, len(sent)) == sent
        assert link.connections == 1
    await until(lambda: link.connections == 0)


async def test_the_end_of_a_connection_passes_after_its_bytes(link: Link, echo: Echo) -> None:
    """A client that says something and leaves is heard."""
    async with connection(link) as (reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await reader.read() == b"last words"
    await until(lambda: echo.ends == 1)


async def test_a_cut_link_ends_connections_and_refuses_new_ones(link: Link, echo: Echo) -> None:
    """Until it is healed, on the same port."""
    url = link.url
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.cut()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                assert await reader.read() == b""
    await until(lambda: echo.ends == 1)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(link.host, link.port)
    link.cut()
    link.heal()
    assert link.url == url
    async with connection(link) as (reader, writer):
        writer.write(b"two")
        assert await read(reader, 3) == b"two"


async def test_a_held_link_is_silent_and_delivers_on_release(link: Link, echo: Echo) -> None:
    """The connection stays open, and nothing is lost."""
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.hold()
        writer.write(b"two")
        assert await stays_silent(reader)
        assert echo.heard == b"one"
        link.release()
        assert await read(reader, 3) == b"two"


async def test_holding_up_lets_the_server_speak_only(link: Link, echo: Echo) -> None:
    """The server does not hear the client."""
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.hold("up")
        writer.write(b"two")
        assert await stays_silent(reader)
        assert echo.heard == b"one"
        link.release("up")
        assert await read(reader, 3) == b"two"


async def test_holding_down_lets_the_client_speak_only(link: Link, echo: Echo) -> None:
    """The server hears the client; its answers wait."""
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.hold("down")
        writer.write(b"two")
        await until(lambda: echo.heard == b"onetwo")
        assert await stays_silent(reader)
        link.release("down")
        assert await read(reader, 3) == b"two"


async def test_a_connection_made_while_held_works_after_release(link: Link, echo: Echo) -> None:
    """As one whose first packets came late."""
    link.hold()
    async with connection(link) as (reader, writer):
        writer.write(b"early")
        assert await stays_silent(reader)
        assert echo.heard == b""
        link.heal()
        assert await read(reader, 5) == b"early"


async def test_a_delay_is_latency_in_its_direction_and_not_per_message(link: Link) -> None:
    """Fifty messages one after the other take one delay, not fifty."""
    loop = asyncio.get_running_loop()
    link.delay(0.2, "down")
    async with connection(link) as (reader, writer):
        began = loop.time()
        for number in range(50):
            writer.write(bytes([number]))
            await asyncio.sleep(0.001)
        assert await read(reader, 50) == bytes(range(50))
        assert 0.2 <= loop.time() - began < 2.0
        link.heal()
        writer.write(b"fast")
        assert await read(reader, 4) == b"fast"


async def test_a_choked_link_passes_so_much_a_second_and_holds_up_the_writer(
    link: Link, echo: Echo
) -> None:
    """Both connections share the line; what was written is late, not lost."""
    loop = asyncio.get_running_loop()
    async with connection(link) as (reader, writer), connection(link) as (other, to_other):
        link.choke(40_000, "up")
        began = loop.time()
        writer.write(bytes(10_000))
        to_other.write(bytes(10_000))
        await asyncio.gather(read(reader, 10_000), read(other, 10_000))
        assert 0.4 < loop.time() - began < 3.0
        # More than all buffers in between: it has to wait.
        link.choke(1_000, "up")
        writer.write(bytes(16 * 1024 * 1024))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(_SILENCE_S):
                await writer.drain()
        assert len(echo.heard) < 1024 * 1024
        link.heal()
        assert await read(reader, 16 * 1024 * 1024) == bytes(16 * 1024 * 1024)


async def test_what_is_held_when_the_link_is_cut_is_lost(link: Link, echo: Echo) -> None:
    """As on a network."""
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.hold("up")
        writer.write(b"two")
        assert await stays_silent(reader)
        link.cut()
        link.heal()
        await until(lambda: echo.ends == 1)
        assert echo.heard == b"one"


async def test_a_link_to_nobody_ends_each_connection_and_works_when_somebody_is_there() -> None:
    """The target need not be there when the link is opened."""
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with await Link.open("127.0.0.1", port) as link:
        async with connection(link) as (reader, _):
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(5):
                    assert await reader.read() == b""
        async with (
            await asyncio.start_server(echo.serve, "127.0.0.1", port),
            connection(link) as (reader, writer),
        ):
            writer.write(b"now")
            assert await read(reader, 3) == b"now"


async def test_closing_ends_everything_and_can_be_repeated(echo: Echo) -> None:
    """No task is left, and a closed link is not healed."""
    before = asyncio.all_tasks()
    link = await Link.open("127.0.0.1", echo.port)
    async with connection(link) as (reader, writer):
        writer.write(b"one")
        await read(reader, 3)
        link.hold()
        await link.close()
        await link.close()
        assert link.connections == 0
    with pytest.raises(RuntimeError):
        link.heal()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(link.host, link.port)
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_wrong_direction_or_delay_is_refused(link: Link) -> None:
    """A typo must not make a test pass."""
    with pytest.raises(ValueError, match="sideways"):
        link.hold("sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        link.delay(-1)
    with pytest.raises(ValueError, match="positive"):
        link.choke(0)


async def test_a_real_server_is_reached_lost_and_reached_again() -> None:
    """Through hold, cut, and a restart of the server behind it."""
    async with EmbeddedServer() as server:
        port = int(server.url.rpartition(":")[2])
        async with await Link.open("127.0.0.1", port) as link:
            assert (await probe_server(link.url)).jetstream
            link.hold("down")
            with pytest.raises(ServerError):
                await probe_server(link.url, timeout=0.2)
            link.cut()
            with pytest.raises(ServerError):
                await probe_server(link.url, timeout=0.2)
            link.heal()
            assert (await probe_server(link.url)).jetstream
            server.kill()
            with pytest.raises(ServerError):
                await probe_server(link.url, timeout=0.5)
            await server.restart()
            assert (await probe_server(link.url)).jetstream
