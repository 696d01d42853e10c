"""Two machines on one LAN, as two network namespaces with a cable between them.

Run in a user and network namespace of its own (``unshare -Urn``). The far
namespace has a nats-server and `foundation discovery announce`; here, where
nothing is known but ``mdns://bench``, a client connects and sends. Then the
server moves to another port. Prints what it sees; asserts the rest.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

NEAR, FAR = "10.77.0.1", "10.77.0.2"


def _ip(*words: str, pid: int | None = None) -> None:
    inside = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
    subprocess.run([*inside, "ip", *words], check=True, timeout=10)


async def far() -> None:
    """Serve, announce, move when told to, until stdin ends."""
    from foundation_nats.node.embedded import EmbeddedConfig
    from foundation_nats.testing import TestServer

    print("separate", flush=True)
    sys.stdin.readline()
    for turn in range(2):
        async with TestServer(EmbeddedConfig(host=FAR, insecure=True)) as server:
            announcer = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "foundation_cli.main", "discovery", "announce"),
                *("-s", server.url, "-c", "bench"),
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                assert announcer.stdout is not None
                line = await asyncio.wait_for(announcer.stdout.readline(), 20)
                print(f"{server.url} {line.decode().strip()}", flush=True)
                await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
                if turn == 0:
                    server.kill()
            finally:
                announcer.send_signal(signal.SIGINT)
                assert await asyncio.wait_for(announcer.wait(), 10) == 0


async def near(child: asyncio.subprocess.Process) -> None:
    """Connect by multicast alone, twice to the same cluster."""
    from foundation_nats import Cluster
    from foundation_nats.errors import BusUnavailableError
    from foundation_nats.testing import eventually

    assert child.stdin is not None
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), 10) == b"separate\n"
    _ip("link", "set", "lo", "up")
    _ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1", "netns", str(child.pid))
    _ip("addr", "add", f"{NEAR}/24", "dev", "lan0")
    _ip("link", "set", "lan0", "up")
    _ip("addr", "add", f"{FAR}/24", "dev", "lan1", pid=child.pid)
    _ip("link", "set", "lo", "up", pid=child.pid)
    _ip("link", "set", "lan1", "up", pid=child.pid)
    child.stdin.write(b"go\n")
    url, said = (await asyncio.wait_for(child.stdout.readline(), 30)).decode().split(maxsplit=1)
    assert said.startswith(f"Announced: {FAR}."), said
    with pytest.raises(BusUnavailableError, match="announced: bench"):
        await Cluster.connect("mdns://other", timeout=3.0)
    async with Cluster.connect("mdns://bench", cluster="bench") as cluster:
        assert cluster.url == url, (cluster.url, url)
        await cluster.send("visits", "counter.add", {"amount": 1})
        child.stdin.write(b"move\n")
        moved, _ = (await asyncio.wait_for(child.stdout.readline(), 30)).decode().split(maxsplit=1)
        assert moved != url
        await eventually(
            lambda: cluster.bus.is_connected and cluster.url == moved, timeout=20, message="follows"
        )
        print(f"found {url}, then {moved}")
    child.stdin.write(b"end\n")
    assert await asyncio.wait_for(child.wait(), 20) == 0


async def main() -> None:
    """Start the far side and be the near one."""
    child = await asyncio.create_subprocess_exec(
        *("unshare", "-n", sys.executable, "-m", "tests.discovery.lan", "far"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        await near(child)
    finally:
        if child.returncode is None:
            os.kill(child.pid, signal.SIGKILL)
            await child.wait()


if __name__ == "__main__":
    asyncio.run(far() if sys.argv[1:] == ["far"] else main())
