"""The power goes while a domain is written, compacted and followed: what is left is one history."""

from __future__ import annotations

import asyncio

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.chaos.workloads.domains import Append
from foundation_nats.consensus import replica as replica_module
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.disks import MortalDisk, can_mount
from tests.cluster.domains import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(90),
    pytest.mark.skipif(can_mount() is not None, reason=can_mount() or ""),
]


class Busy(Store):
    """Compacts all the time."""

    snapshot_every = 5


@pytest.mark.parametrize("sync_interval", ["always", "100ms"])
async def test_a_power_cut_leaves_a_beginning_of_the_log_and_no_contradiction(
    sync_interval: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lived through it and who comes later agree; `always` loses nothing that was accepted."""
    monkeypatch.setattr(replica_module, "_REWOUND_AFTER_S", 0.5)
    with MortalDisk(256) as disk:
        config = EmbeddedConfig(store=disk.path, sync_interval=sync_interval, max_file=2 * 1024**3)
        async with TestServer(config) as server, Cluster.connect(server.url) as cluster:
            accepted: list[str] = []

            async def propose() -> None:
                for n in range(100_000):
                    try:
                        found = await cluster.consensus.propose(
                            Busy, Append(item=f"{n}"), id=f"{n}", timeout=1
                        )
                    except FoundationError:
                        return
                    if not found.accepted:
                        return
                    accepted.append(f"{n}")

            await cluster.consensus.open(Busy)
            working = asyncio.create_task(propose())
            await eventually(lambda: len(accepted) > 150, timeout=30)
            server.kill()
            disk.power_loss()
            await asyncio.wait([working])
            await server.restart()
            await cluster.bus.wait_connected(10)
            async with Cluster.connect(server.url, name="late") as late:
                left = (await late.consensus.read(Busy, timeout=10)).items
                everything = [f"{n}" for n in range(len(accepted) + 1)]
                assert left == everything[: len(left)], "holes, or another order"
                if sync_interval == "always":
                    assert len(left) >= len(accepted)
                print(f"{sync_interval}: {len(left)} of {len(accepted)} accepted are left")
                assert (await late.consensus.propose(Busy, Append(item="after"))).accepted
                # The survivor may have applied more than there is: it must come to the same.
                survivor = await cluster.consensus.open(Busy)

                async def agrees() -> bool:
                    return (await survivor.read()).items == [*left, "after"]

                await eventually(agrees, timeout=20)
                assert (await survivor.propose(Append(item="more"))).accepted
                assert (await late.consensus.read(Busy)).items == [*left, "after", "more"]
