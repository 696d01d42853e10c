"""Clients follow servers that have moved: the old address is dead, the locator leads to the new one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from foundation_nats import Cluster
from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig
from foundation_nats.errors import BusUnavailableError, ConfigError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.brokers import free_port
from tests.conftest import AGENTS
from tests.discovery.nameserver import Nameserver


@pytest.fixture
async def nameserver() -> AsyncIterator[Nameserver]:
    """A nameserver that knows nothing yet."""
    async with Nameserver() as running:
        yield running


def _write(path: Path, *urls: str) -> None:
    new = path.with_suffix(".new")
    new.write_text("\n".join(urls) + "\n")
    os.replace(new, path)


async def test_a_connection_follows_the_file_after_its_server_was_killed(tmp_path: Path) -> None:
    """The server dies before the file says where the new one is; subscriptions survive."""
    path = tmp_path / "servers"
    heard: list[bytes] = []
    async with TestServer() as old:
        _write(path, old.url)
        bus = await Bus.connect(BusConfig(servers=(f"file://{path}",)), "test")
        try:
            bus.subscribe("news", lambda message: heard.append(message.data))
            assert bus.url == old.url
            old.kill()
            await eventually(lambda: not bus.is_connected, message="the loss is noticed")
            async with TestServer() as new:
                _write(path, new.url)
                await bus.wait_connected(10.0)
                assert bus.url == new.url
                await bus.flush()
                bus.publish("news", b"moved")
                await eventually(
                    lambda: heard == [b"moved"], message="the subscription is replayed"
                )
        finally:
            await bus.close()


async def test_a_change_of_the_file_is_known_before_the_connection_drops(tmp_path: Path) -> None:
    """And a connection that works is left alone, whatever the file says."""
    path = tmp_path / "servers"
    async with TestServer() as old, TestServer() as new:
        _write(path, old.url)
        bus = await Bus.connect(BusConfig(servers=(f"file://{path}",)), "test")
        try:
            _write(path, new.url)
            await eventually(
                lambda: [uri.port for uri in bus._client.servers] == [urlsplit(new.url).port],
                message="the change is taken up",
            )
            assert bus.is_connected
            assert bus.url == old.url
            path.write_text("what is this\n")
            old.kill()
            await eventually(lambda: bus.url == new.url and bus.is_connected, message="it follows")
        finally:
            await bus.close()


async def test_a_connection_follows_srv_records(nameserver: Nameserver) -> None:
    """The first by priority is taken, then whatever the records say when it is gone."""
    name = "_nats._tcp.example.org"
    nameserver.zone["nats.example.org", "A"] = ["127.0.0.1"]
    async with TestServer() as first, TestServer() as second:
        one, two = first.url.rpartition(":")[2], second.url.rpartition(":")[2]
        nameserver.zone[name, "SRV"] = [
            f"20 0 {two} nats.example.org.",
            f"10 0 {one} nats.example.org.",
        ]
        entry = f"dns+srv://{name}?nameserver={nameserver.address}"
        bus = await Bus.connect(BusConfig(servers=(entry,)), "test")
        try:
            assert bus.url == first.url
            first.kill()
            await eventually(lambda: bus.url == second.url and bus.is_connected, message="failover")
            second.kill()
            async with TestServer() as third:
                port = third.url.rpartition(":")[2]
                nameserver.zone[name, "SRV"] = [f"0 0 {port} nats.example.org."]
                await eventually(lambda: bus.url == third.url and bus.is_connected, message="moved")
        finally:
            await bus.close()


async def test_a_nameserver_that_is_silent_does_not_keep_a_client_from_what_it_knows(
    nameserver: Nameserver,
) -> None:
    """The server comes back at its old address while nobody answers about addresses."""
    nameserver.zone["nats.example.org", "A"] = ["127.0.0.1"]
    async with TestServer() as server:
        port = server.url.rpartition(":")[2]
        entry = f"dns://nats.example.org:{port}?nameserver={nameserver.address}"
        bus = await Bus.connect(BusConfig(servers=(entry,)), "test")
        try:
            nameserver.silent = True
            server.kill()
            await eventually(lambda: not bus.is_connected, message="the loss is noticed")
            await server.restart()
            await bus.wait_connected(5.0)
        finally:
            await bus.close()


async def test_a_connection_closes_at_once_while_it_looks_for_servers(
    nameserver: Nameserver,
) -> None:
    """Nothing is left waiting for a nameserver."""
    nameserver.zone["nats.example.org", "A"] = ["127.0.0.1"]
    async with TestServer() as server:
        port = server.url.rpartition(":")[2]
        entry = f"dns://nats.example.org:{port}?nameserver={nameserver.address}"
        bus = await Bus.connect(BusConfig(servers=(entry,)), "test")
        nameserver.silent = True
        server.kill()
        await eventually(lambda: not bus.is_connected, message="the loss is noticed")
        async with asyncio.timeout(1.5):
            await bus.close()


async def test_connecting_says_what_the_locator_led_to(tmp_path: Path) -> None:
    """A locator without servers, servers that don't answer, a locator that is none."""
    path = tmp_path / "servers"
    config = BusConfig(servers=(f"file://{path}",), connect_timeout_s=0.6)
    with pytest.raises(BusUnavailableError, match=str(path)):
        await Bus.connect(config, "test")
    port = free_port()
    _write(path, f"nats://me:secret@127.0.0.1:{port}")
    with pytest.raises(BusUnavailableError, match=f"file://{path}.*127.0.0.1:{port}") as caught:
        await Bus.connect(config, "test")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="consul"):
        await Bus.connect(BusConfig(servers=("consul://x",)), "test")


@pytest.mark.cluster
@pytest.mark.timeout(90)
async def test_a_cluster_goes_on_when_its_server_has_moved(tmp_path: Path) -> None:
    """Nodes, their workers and the client: the server is killed, its store served on another port."""
    path, store = tmp_path / "servers", tmp_path / "store"
    async with TestServer(EmbeddedConfig(store=store)) as old:
        _write(path, old.url)
        entry = f"file://{path}"
        limit = {"mailbox": {"signals_max_bytes": old.signals_max_bytes}}
        async with TestCluster(
            nodes=2, path=[str(AGENTS)], urls=[entry], settings=limit
        ) as cluster:
            client = cluster.client
            await client.agents.start("fleet:Counter", id="visits")
            assert await client.ask("visits", "counter.add", {"amount": 2}, timeout=20) == 2
            old.kill()
            await old.stop()
            async with TestServer(EmbeddedConfig(store=store)) as new:
                assert new.url != old.url
                _write(path, new.url)

                async def answered() -> bool:
                    return bool(await client.ask("visits", "counter.add", {"amount": 1}) >= 3)

                await eventually(answered, timeout=30, message="the agent answers")
                assert client.url == new.url
                await cluster.wait_up(["n1", "n2"])
                async with Cluster.connect(entry, cluster="test") as another:
                    assert await another.ask("visits", "counter.get") >= 3
