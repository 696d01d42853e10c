"""Multicast, with real sockets: on the loopback interface, and on a LAN of two network namespaces."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from foundation_nats import Cluster
from foundation_nats.discovery.mdns import Announcement
from foundation_nats.discovery.servers import Servers, find
from foundation_nats.errors import BusUnavailableError, ConfigError
from foundation_nats.testing import TestServer, eventually

LOCAL = "interface=127.0.0.1"
ROOT = Path(__file__).parents[2]


@lru_cache(maxsize=1)
def _why_not() -> str | None:
    """Why the loopback interface carries no multicast; None if it does."""

    async def probe() -> None:
        async with Announcement("nats://127.0.0.1:1", "can-we"):
            await find(f"mdns://can-we?{LOCAL}", 3.0)

    try:
        asyncio.run(probe())
    except BusUnavailableError as error:
        return error.message
    return None


@pytest.fixture(autouse=True)
def multicast() -> Iterator[None]:
    """Skip where the loopback interface carries no multicast; one test at a time, as all hear each other."""
    with (Path(tempfile.gettempdir()) / "foundation-test-mdns.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if (reason := _why_not()) is not None:
            pytest.skip(f"no multicast on loopback here: {reason}")
        yield


async def test_an_announced_server_is_found_by_its_cluster_and_no_other() -> None:
    """A client connects by the name alone; a wrong name says which there are."""
    async with TestServer() as server, Announcement(server.url, "Bench 1"):
        assert await Servers([f"mdns://Bench%201?{LOCAL}"]).resolve(3.0) == [server.url]
        async with Cluster.connect(f"mdns://Bench%201?{LOCAL}") as cluster:
            assert cluster.url == server.url
        with pytest.raises(BusUnavailableError, match="announced: Bench 1"):
            await find(f"mdns://bench?{LOCAL}", 2.5)


async def test_servers_of_several_clusters_are_not_mixed_up() -> None:
    """`mdns://` joins the only cluster there is; of two it takes none, and says which."""
    async with Announcement("nats://127.0.0.1:11", "one"):
        async with Announcement("nats://127.0.0.1:12", "one"):
            found = await Servers([f"mdns://?{LOCAL}"]).resolve(3.0)
            assert sorted(found) == ["nats://127.0.0.1:11", "nats://127.0.0.1:12"]
        async with Announcement("tls://127.0.0.1:13", "two"):
            with pytest.raises(ConfigError, match="one, two"):
                await Servers([f"mdns://?{LOCAL}"]).resolve(3.0)
            assert await Servers([f"mdns://two?{LOCAL}"]).resolve(3.0) == ["tls://127.0.0.1:13"]


async def test_a_withdrawn_server_is_not_found() -> None:
    """Nor one that nobody announces; the error comes in time and says what to do."""
    async with Announcement("nats://127.0.0.1:11", "gone") as announcement:
        assert announcement.is_local
        await announcement.withdraw()
        began = asyncio.get_running_loop().time()
        with pytest.raises(BusUnavailableError, match="discovery announce"):
            await find(f"mdns://gone?{LOCAL}", 0.8)
        assert asyncio.get_running_loop().time() - began < 1.3
        await announcement.announce()
        assert len(await find(f"mdns://gone?{LOCAL}", 3.0)) == 1


@pytest.mark.parametrize("url", ["nats://0.0.0.0:4222", "http://x", "nats://", "nats://x:port"])
async def test_what_others_could_not_connect_to_is_not_announced(url: str) -> None:
    """The error names the URL or the address."""
    with pytest.raises(ConfigError):
        async with Announcement(url, "bench"):
            pass


@pytest.mark.slow
async def test_the_command_announces_while_the_server_answers() -> None:
    """It says that only this machine hears of it, withdraws when the server is killed, ends with 0."""
    async with TestServer() as server:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "foundation_cli.main", "discovery", "announce"),
            *("-s", server.url, "-c", "desk"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert command.stdout is not None
        assert command.stderr is not None
        try:
            line = await asyncio.wait_for(command.stdout.readline(), 15)
            assert "mdns://desk" in line.decode()
            line = await asyncio.wait_for(command.stderr.readline(), 15)
            assert "this machine only" in line.decode()
            assert [item.url for item in await find(f"mdns://desk?{LOCAL}", 3.0)] == [server.url]
            server.kill()
            line = await asyncio.wait_for(command.stderr.readline(), 15)
            assert "withdrawn" in line.decode()
            with pytest.raises(BusUnavailableError):
                await find(f"mdns://desk?{LOCAL}", 0.8)
            await server.restart()
            line = await asyncio.wait_for(command.stderr.readline(), 15)
            assert "announced" in line.decode()
            await eventually(lambda: find(f"mdns://desk?{LOCAL}", 1.0), message="found again")
        finally:
            command.send_signal(signal.SIGINT)
            code = await asyncio.wait_for(command.wait(), 10)
        assert code == 0


def _has_namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    words = ["unshare", "-Urn", "ip", "link", "add", "lan0", "type", "veth"]
    return subprocess.run(words, capture_output=True, timeout=10).returncode == 0


@pytest.mark.slow
async def test_two_machines_on_one_lan_find_each_other() -> None:
    """Two network namespaces: announce, find, connect, send; the server moves, the client follows."""
    if not _has_namespaces():
        pytest.skip("this machine allows no network namespaces")
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-Urn", sys.executable, "-m", "tests.discovery.lan"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, out.decode()
    assert "found nats://10.77.0.2:" in out.decode()
