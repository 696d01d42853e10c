"""What is told of nodes that join, fall silent, return, die and leave: each with what the node is."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from foundation_nats import __version__
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import ClusterEvent
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

QUICK = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 2.5}}
ARGUMENTS = ("--capability", "gpu", "--capacity", "slots=7")


def about(zone: str, incarnation: int, **more: object) -> dict[str, object]:
    """The data of an event about ``n3``."""
    return {
        "node": "n3",
        "incarnation": incarnation,
        "host": socket.gethostname(),
        "version": __version__,
        "workers": 1,
        "labels": {"zone": zone, "rack": "7"},
        "capabilities": ["gpu"],
        **more,
    }


class Told:
    """What the event log and one agent say of ``n3``, in order."""

    def __init__(self, nodes: TestCluster) -> None:
        self._client = nodes.client
        self._seen = 0

    async def events(self) -> list[ClusterEvent]:
        """Those of the log."""
        found = await self._client.events.list(topic="node", limit=1000)
        return [event for event in found if event.data["node"] == "n3"]

    async def expect(self, *whats: str, in_order: bool = True) -> list[dict[str, Any]]:
        """The data of the next events, which must be these; their capacity is checked here."""

        async def there() -> list[ClusterEvent] | None:
            new = (await self.events())[self._seen :]
            return new if len(new) >= len(whats) else None

        found = await eventually(there, timeout=20, message=f"{', '.join(whats)} of n3")
        assert found is not None
        said = [event.what for event in found]
        assert (said if in_order else sorted(said)) == list(whats)
        self._seen += len(whats)
        for event in found:
            assert event.data.pop("capacity")["slots"] == 7
        return [event.data for event in found]

    async def heard(self, *words: str) -> list[dict[str, Any]]:
        """What the agent was told, which must come to be these words."""

        async def there() -> list[dict[str, Any]] | None:
            said = (await self._client.agents.state("ear") or {})["state"].get("told", [])
            of_it = [item for item in said if item["data"].get("node") == "n3"]
            return of_it if len(of_it) >= len(words) else None

        found = await eventually(there, timeout=20, message=f"the agent hears {words}")
        assert found is not None
        assert [item["type"] for item in found] == [f"cluster.{word}" for word in words]
        for item in found:
            assert item["data"].pop("capacity")["slots"] == 7
        return [item["data"] for item in found]


async def test_every_event_of_a_node_says_what_the_node_is() -> None:
    """Its life, its labels with the zone, capabilities, capacity, host, version; and the cause."""
    async with TestCluster(nodes=2, settings=QUICK, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Listener", id="ear", critical=True)
        told = Told(nodes)

        async def life() -> int:
            return (await client.nodes.get("n3")).incarnation

        node = nodes.start_node("n3", "--label", "zone=b", "--label", "rack=7", *ARGUMENTS)
        (joined,) = await told.expect("joined")
        first = await life()
        assert joined == about("b", first)

        node.pause()
        suspect, down = await told.expect("suspect", "down")
        assert suspect == about("b", first, cause="silence")
        assert down == about("b", first, cause="silence")
        node.resume()
        (returned,) = await told.expect("returned")
        second = await life()
        assert second > first
        assert returned == about("b", second, cause="heard")

        node.pause()
        (suspect,) = await told.expect("suspect")
        assert suspect == about("b", second, cause="silence")
        node.resume()
        (returned,) = await told.expect("returned")
        assert returned == about("b", second, cause="heard")

        node.kill_all()
        suspect, down = await told.expect("suspect", "down")
        assert suspect == about("b", second, cause="no_responders")
        assert down == about("b", second, cause="no_responders")

        node = nodes.start_node("n3", "--label", "zone=c", "--label", "rack=7", *ARGUMENTS)
        # The node itself says that it joined, the leader that it is back, in any order.
        back = await told.expect("joined", "returned", in_order=False)
        third = await life()
        assert sorted(back, key=len) == [about("c", third), about("c", third, cause="heard")]

        await client.agents.start("fleet:Counter", id="a", placement={"prefer": ["gpu"]})
        assert (await client.agents.get("a")).node == "n3"
        node.terminate()
        draining, left = await told.expect("draining", "left")
        assert draining == about("c", third)
        assert left == about("c", third, cause="left")

        assert await told.heard(
            "node_up", "node_down", "node_up", "node_down", "node_up", "node_down"
        ) == [
            about("b", first),
            about("b", first, cause="lost"),
            about("b", second),
            about("b", second, cause="lost"),
            about("c", third),
            about("c", third, cause="left"),
        ]
