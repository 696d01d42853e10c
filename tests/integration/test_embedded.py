"""The embedded server against a real nats-server: life, death, locks, and what is said about it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import nats
import psutil
import pytest

from foundation_nats.base.process import die_with_parent
from foundation_nats.errors import ServerError
from foundation_nats.node.embedded import (
    EmbeddedConfig,
    EmbeddedServer,
    find_binary,
    probe_server,
)

_PARENT = """
import asyncio, sys
from pathlib import Path
from foundation_nats.node.embedded import EmbeddedConfig, EmbeddedServer

async def main():
    server = EmbeddedServer(EmbeddedConfig(store=Path(sys.argv[1])))
    await server.start()
    if sys.argv[2] == "frozen":
        server.pause()
    print(server.pid, flush=True)
    await asyncio.sleep(60)

if sys.argv[3] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for temporary files that must be empty after each test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


def is_gone(pid: int) -> bool:
    """Whether no process of this pid runs; one that only waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for *condition*, at most *timeout* seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def config_of(server: EmbeddedServer) -> Path:
    """The configuration file that the process was started with."""
    return Path(psutil.Process(server.pid).cmdline()[-1])


@contextlib.asynccontextmanager
async def speaker(words: bytes) -> AsyncIterator[str]:
    """A server that says *words* to everyone and then keeps silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@contextlib.asynccontextmanager
async def foreign(tmp_path: Path, *arguments: str) -> AsyncIterator[str]:
    """A nats-server that is not ours."""
    port = free_port()
    with (tmp_path / "foreign.log").open("wb") as log:
        process = subprocess.Popen(
            [str(find_binary()), "-a", "127.0.0.1", "-p", str(port), *arguments],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(os.getpid()),
        )

    def listens() -> bool:
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", port)) == 0

    try:
        await until(listens)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(5)


async def store_one(url: str) -> None:
    """Publish one message to a stream that is created for it."""
    client = await nats.connect(url)
    try:
        stream = client.jetstream()
        await stream.add_stream(name="KEPT", subjects=["kept"])
        await stream.publish("kept", b"still here")
    finally:
        await client.close()


async def stored(url: str) -> list[bytes]:
    """What the stream has."""
    client = await nats.connect(url)
    try:
        message = await client.jetstream().get_msg("KEPT", 1)
        return [message.data or b""]
    finally:
        await client.close()


async def test_a_started_server_answers_with_jetstream_on_loopback() -> None:
    """Readiness means JetStream, and nobody from outside can connect."""
    async with EmbeddedServer() as server:
        info = await probe_server(server.url)
        assert info.jetstream
        assert info.api_level >= 1
        assert info.max_payload == 1024**2
        listening = [c for c in psutil.Process(server.pid).net_connections("tcp") if not c.raddr]
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


async def test_the_configuration_is_private_and_says_everything_explicitly() -> None:
    """Nothing that matters is left to the server's defaults."""
    async with EmbeddedServer(EmbeddedConfig(max_file=32 * 1024**2)) as server:
        path = config_of(server)
        text = path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for word in (
            "server_name",
            "listen",
            "sync_interval",
            f"max_file: {32 * 1024**2}",
            "max_mem",
            "default_max_consumers",
            'ping_interval: "10s"',
            "ping_max: 2",
            "ports_file_dir",
            "pid_file",
            "log_file",
        ):
            assert word in text


async def test_without_a_limit_of_ours_the_store_stays_below_the_volume() -> None:
    """max_file is always a number, at most 64 GiB."""
    async with EmbeddedServer() as server:
        line = next(x for x in config_of(server).read_text().splitlines() if "max_file:" in x)
        assert 0 < int(line.split(":")[1]) <= 64 * 1024**3


async def test_stopping_removes_the_process_and_the_private_store() -> None:
    """And a second stop does nothing."""
    server = EmbeddedServer()
    await server.start()
    pid, store = server.pid, server.store
    assert store.is_dir()
    await server.stop()
    assert is_gone(pid)
    assert not store.exists()
    await server.stop()


async def test_stopping_a_server_that_has_died_is_harmless() -> None:
    """Whoever killed it."""
    server = EmbeddedServer()
    await server.start()
    os.kill(server.pid, signal.SIGKILL)
    await server.stop()


async def test_stopping_a_frozen_server_works() -> None:
    """It is thawed to end in order, not left behind."""
    server = EmbeddedServer()
    await server.start()
    pid = server.pid
    server.pause()
    await server.stop()
    assert is_gone(pid)


async def test_a_server_that_was_never_started_can_be_stopped() -> None:
    """So that a clean-up need not ask."""
    await EmbeddedServer().stop()


async def test_what_was_stored_is_there_after_kill_and_restart() -> None:
    """Same store, same port, another process."""
    async with EmbeddedServer() as server:
        await store_one(server.url)
        pid, url = server.pid, server.url
        server.kill()
        assert is_gone(pid)
        await server.restart()
        assert server.url == url
        assert server.pid != pid
        assert await stored(server.url) == [b"still here"]


async def test_a_running_server_can_be_restarted() -> None:
    """It ends in order first."""
    async with EmbeddedServer() as server:
        await store_one(server.url)
        url = server.url
        await server.restart()
        assert server.url == url
        assert await stored(server.url) == [b"still here"]


async def test_a_store_of_ours_outlives_the_server(tmp_path: Path) -> None:
    """The next server on it has the data."""
    config = EmbeddedConfig(store=tmp_path / "store")
    async with EmbeddedServer(config) as server:
        await store_one(server.url)
    async with EmbeddedServer(config) as server:
        assert await stored(server.url) == [b"still here"]


async def test_a_frozen_server_does_not_answer_until_it_goes_on() -> None:
    """SIGSTOP and SIGCONT."""
    async with EmbeddedServer() as server:
        server.pause()
        with pytest.raises(ServerError):
            await probe_server(server.url, timeout=0.3)
        server.resume()
        assert (await probe_server(server.url)).jetstream


async def test_two_servers_never_share_a_store(tmp_path: Path) -> None:
    """The second is told who has it, and what to do."""
    config = EmbeddedConfig(store=tmp_path / "store")
    async with EmbeddedServer(config) as first:
        with pytest.raises(ServerError, match=rf"in use by .*{os.getpid()}.*--store"):
            await EmbeddedServer(config).start()
        assert (await probe_server(first.url)).jetstream
    async with EmbeddedServer(config):
        pass  # free again


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """Exactly that port was asked for, so no other will do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"{port}.*taken.*--port"):
            await EmbeddedServer(EmbeddedConfig(port=port)).start()


async def test_the_exact_port_is_used() -> None:
    """A number means that number."""
    port = free_port()
    async with EmbeddedServer(EmbeddedConfig(port=port)) as server:
        assert server.url == f"nats://127.0.0.1:{port}"


async def test_the_preferred_port_is_used_when_free_and_another_when_taken() -> None:
    """Preferring is not insisting."""
    port = free_port()
    async with (
        EmbeddedServer(EmbeddedConfig(preferred_port=port)) as first,
        EmbeddedServer(EmbeddedConfig(preferred_port=port)) as second,
    ):
        assert first.url.endswith(f":{port}")
        assert not second.url.endswith(f":{port}")


async def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the variable that points to nowhere."""
    monkeypatch.setenv("FOUNDATION_NATS_SERVER", str(tmp_path / "nowhere"))
    with pytest.raises(ServerError, match=r"FOUNDATION_NATS_SERVER.*nowhere"):
        await EmbeddedServer().start()


async def test_a_server_that_ends_at_its_start_has_its_last_words_in_the_error() -> None:
    """Here: of a configuration it does not know."""
    with pytest.raises(ServerError, match=r"unknown field \"nonsense\""):
        await EmbeddedServer(EmbeddedConfig(extra="nonsense: 1")).start()


async def test_an_address_that_others_reach_is_refused() -> None:
    """Nobody asks for credentials there."""
    with pytest.raises(ServerError, match=r"0\.0\.0\.0"):
        await EmbeddedServer(EmbeddedConfig(host="0.0.0.0")).start()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("state", ["running", "frozen"])
async def test_a_server_dies_with_its_killed_parent(tmp_path: Path, state: str, loop: str) -> None:
    """No orphan, and its store is free for the next."""
    store = tmp_path / "store"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(store), state, loop],
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdout is not None
        pid = int(await asyncio.to_thread(process.stdout.readline))
        assert not is_gone(pid)
    finally:
        process.kill()
        process.wait(5)
        assert process.stdout is not None
        process.stdout.close()
    await until(lambda: is_gone(pid))
    async with EmbeddedServer(EmbeddedConfig(store=store)) as server:
        assert (await probe_server(server.url)).jetstream


def test_a_child_whose_parent_is_gone_before_it_asks_ends_itself() -> None:
    """The race between fork and prctl: our parent is not the child's."""
    process = subprocess.Popen(["sleep", "30"], preexec_fn=die_with_parent(os.getppid()))
    assert process.wait(5) == 1


async def test_a_server_without_jetstream_is_named(tmp_path: Path) -> None:
    """With the option that mends it."""
    async with foreign(tmp_path) as url:
        with pytest.raises(ServerError, match=r"JetStream.*nats-server -js"):
            await probe_server(url)


@pytest.mark.parametrize(
    ("says", "knows"),
    [
        ("nats-server: v2.14.6", False),
        ("nats-server: v2.15.0", True),
        ("v3.0.0-beta", True),
        ("", True),
    ],
)
def test_an_older_server_is_not_given_a_setting_that_it_does_not_know(
    says: str, knows: bool, tmp_path: Path
) -> None:
    """It would end at its start."""
    binary = tmp_path / "nats-server"
    binary.write_text(f"#!/bin/sh\necho '{says}'\n")
    binary.chmod(0o700)
    server = EmbeddedServer(EmbeddedConfig(max_file=1))
    assert ("default_max_consumers" in server._settings(str(binary), 4222)) == knows


async def test_a_server_that_is_too_old_is_named() -> None:
    """With its version and the one needed."""
    async with speaker(b'INFO {"version":"2.9.0","jetstream":true}\r\n') as url:
        with pytest.raises(ServerError, match=r"2\.9\.0.*2\.14\.0"):
            await probe_server(url)


async def test_something_else_than_nats_is_named() -> None:
    """A mail server, for instance."""
    async with speaker(b"220 mail.example ESMTP\r\n") as url:
        with pytest.raises(ServerError, match="NATS server"):
            await probe_server(url)


async def test_something_that_says_nothing_is_given_up_in_time() -> None:
    """A web server waits for us, for instance."""
    async with speaker(b"") as url:
        with pytest.raises(ServerError, match="NATS server"):
            await probe_server(url, timeout=0.2)


async def test_an_address_where_nobody_listens_is_named() -> None:
    """With what to start."""
    port = free_port()
    with pytest.raises(ServerError, match=rf"{port}.*foundation up"):
        await probe_server(f"nats://127.0.0.1:{port}")
