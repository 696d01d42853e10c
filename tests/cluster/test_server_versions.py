"""Servers of several versions in one cluster, while they are upgraded and downgraded; real ones, from `make servers`."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.base.process import die_with_parent
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import api
from foundation_nats.config import BusConfig
from foundation_nats.errors import ServerError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.brokers import Brokers, free_port
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

OLDEST = "2.14.0"
"""The oldest that is supported."""
TOO_OLD = "2.12.8"


def binary(version: str) -> str:
    """Where `make servers` puts it; skips the test where it was not run."""
    path = Path(sys.prefix) / "servers" / version / "bin" / "nats-server"
    if not path.exists():
        pytest.skip(f"nats-server {version} is not installed; `make servers` does it")
    return str(path)


async def version(server: TestServer) -> str:
    """What it says that it is."""
    bus = await Bus.connect(BusConfig(servers=(server.url,)), "probe")
    try:
        return str(bus.server_facts["version"])
    finally:
        await bus.close()


async def in_step(cluster: Cluster) -> bool:
    """Whether every copy of every stream is up to date."""
    found = await api(cluster.bus, "STREAM.LIST")
    for stream in found["streams"]:
        info = (await api(cluster.bus, "STREAM.INFO", stream["config"]["name"]))["cluster"]
        if not info.get("leader") or not all(
            item.get("current") and not item.get("offline") for item in info["replicas"]
        ):
            return False
    return len(found["streams"]) > 5


@pytest.mark.usefixtures("chaos")
async def test_servers_are_upgraded_and_one_is_downgraded_under_load() -> None:
    """One after the other, each on its store: nothing is lost or repeated, nobody is declared down."""
    oldest = binary(OLDEST)
    async with Brokers(binary=oldest) as brokers:
        probe = await Bus.connect(BusConfig(servers=tuple(brokers.urls)), "probe")
        await eventually(lambda: api(probe, "INFO"), timeout=30, message="they have a leader")
        await probe.close()
        async with TestCluster(
            nodes=3, path=[str(AGENTS)], urls=brokers.urls, settings={"replicas": 3}
        ) as nodes:
            assert await version(brokers.servers[0]) == OLDEST
            await workload.deploy(nodes)
            load = workload.Load(nodes.client)
            load.start()
            await eventually(lambda: load.receipts > 50, message="load flows")
            seen = []
            for server, to in [
                *((server, None) for server in brokers.servers),
                (brokers.servers[0], oldest),
            ]:
                await server.become(to)
                await eventually(
                    lambda: in_step(nodes.client), timeout=60, message="all copies are current"
                )
                before = load.receipts
                await eventually(
                    lambda before=before: load.receipts > before + 50,
                    timeout=30,
                    message="load flows on",
                )
                seen.append([await version(each) for each in brokers.servers])
            newest = seen[2][0]
            assert newest != OLDEST, "void: there is one version"
            assert seen == [
                [newest, OLDEST, OLDEST],
                [newest, newest, OLDEST],
                [newest] * 3,
                [OLDEST, newest, newest],
            ]
            history = await load.stop()
            await workload.verdict(nodes, history, minimum=200)
            await workload.everyone_runs_once(nodes)
            told = [event.what for event in await nodes.client.events.list(limit=1000)]
            assert "down" not in told


@pytest.mark.usefixtures("chaos")
async def test_a_server_that_is_too_old_is_refused_by_its_version(tmp_path: Path) -> None:
    """By whoever starts it, and by a client and a node that find it; at once."""
    older = binary(TOO_OLD)
    says = rf"{TOO_OLD}.*{OLDEST} or newer is needed"
    began = monotonic()
    with pytest.raises(ServerError, match=says):
        await TestServer(EmbeddedConfig(binary=older)).start()
    assert monotonic() - began < 10
    port = free_port()
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [older, "-js", "-sd", str(tmp_path), "-a", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(os.getpid()),
        )
    try:
        url = f"nats://127.0.0.1:{port}"
        with pytest.raises(ServerError, match=says):
            await Cluster.connect(url, name="test")
        command = [sys.executable, "-m", "foundation_cli.main", "node", "start", "--server", url]
        node = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        _, said = await asyncio.wait_for(node.communicate(), 30)
        assert node.returncode == 1
        assert re.search(says, said.decode())
    finally:
        server.kill()
        server.wait()
