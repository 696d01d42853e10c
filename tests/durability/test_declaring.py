"""Who declares the streams of a cluster, and who must not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from foundation_nats import Cluster
from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import api, append
from foundation_nats.config import Config
from foundation_nats.errors import ServerError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer

_MIB = 1024**2


def config_of(server: TestServer, **mailbox: int) -> Config:
    """A small cluster's settings."""
    return Config.load(bus={"servers": (server.url,)}, mailbox=mailbox)


async def test_an_interrupted_declaration_is_completed_by_the_next(server: TestServer) -> None:
    """Whoever began it ended; nobody has written anything yet, so nothing can be lost."""
    config = config_of(server)
    bus = await Bus.connect(config.bus, "first")
    declared = assets.declared_streams(config, 64 * _MIB)
    for stream in declared[2:6]:
        await api(bus, "STREAM.CREATE", stream["name"], stream)
    async with Cluster.connect(config=config):
        names = (await api(bus, "STREAM.NAMES"))["streams"]
    assert {stream["name"] for stream in declared} <= {*names}
    await bus.close()


async def test_many_declare_one_cluster_at_once(server: TestServer) -> None:
    """Nobody takes what another has not declared yet for lost, although the first write at once."""

    async def join(number: int) -> None:
        async with Cluster.connect(config=config_of(server), name=f"c{number}") as cluster:
            await cluster.send("somebody", "hello")

    await asyncio.gather(*(join(number) for number in range(12)))


@pytest.mark.parametrize("kind", ["nodes", "agents", "state", "desired", "leases", "settings"])
async def test_each_bucket_of_a_cluster_in_use_can_be_missed(server: TestServer, kind: str) -> None:
    """Whichever is gone is named, nothing is made, and `leave` connects all the same."""
    config = config_of(server)
    async with Cluster.connect(config=config) as cluster:
        await append(cluster.bus, cluster.subjects.mailbox("a"), b"x")
        name = cluster.subjects.bucket_stream(kind)
        await api(cluster.bus, "STREAM.DELETE", name)
        with pytest.raises(ServerError, match=name) as caught:
            await Cluster.connect(config=config)
        assert caught.value.details["missing"] == [name]
        async with Cluster.connect(config=config, missing="leave") as other:
            assert name not in (await api(other.bus, "STREAM.NAMES"))["streams"]


@pytest.mark.parametrize("max_file_mib", [160, 900, 1100, 2100, 20_000])
async def test_whatever_the_size_of_the_store_a_part_of_it_is_left_for_state(
    max_file_mib: int,
) -> None:
    """The limit of SIGNALS is found by trial here, as against any server but our own."""
    async with AsyncExitStack() as stack:
        server = TestServer(EmbeddedConfig(max_file=max_file_mib * _MIB))
        await stack.enter_async_context(server)
        cluster = await stack.enter_async_context(Cluster.connect(config=config_of(server)))
        reserved = (await api(cluster.bus, "INFO"))["reserved_storage"]
        assert max_file_mib * _MIB * 0.3 < reserved < max_file_mib * _MIB * 0.95
