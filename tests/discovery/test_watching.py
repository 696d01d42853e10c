"""`cluster.nodes.watch`, `on_up` and `on_down`: what a client is told about nodes that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from foundation_nats import Cluster
from foundation_nats.api.watching import NodeChange, NodeChangeKind, Watcher, differences
from foundation_nats.cluster.view import NodeView
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import NodeRecord, NodeStatus

JOINED, LEFT, SUSPECT, DOWN, RETURNED = NodeChangeKind
UP = NodeStatus.UP

SETTINGS = {
    "liveness": {
        "heartbeat_interval_s": 0.2,
        "suspect_after_s": 0.6,
        "down_after_s": 1.8,
        "bus_grace_s": 3.0,
    }
}


def _view(status: NodeStatus, incarnation: int = 1, pid: int = 10) -> dict[str, NodeView]:
    record = NodeRecord(name="n", incarnation=incarnation, host="h", pid=pid, started_at=f"t{pid}")
    return {"n": NodeView(record, status)}


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([{}, _view(NodeStatus.SUSPECT), _view(UP)], [JOINED]),
        ([{}, _view(NodeStatus.SUSPECT), _view(NodeStatus.DOWN)], []),
        ([_view(UP), _view(NodeStatus.DRAINING), _view(UP)], []),
        ([_view(UP), _view(NodeStatus.SUSPECT), _view(UP)], [SUSPECT, RETURNED]),
        ([_view(UP), _view(NodeStatus.SUSPECT), _view(NodeStatus.DOWN)], [SUSPECT, DOWN]),
        ([_view(UP), _view(NodeStatus.DOWN), {}], [DOWN]),
        ([_view(UP), {}], [LEFT]),
        ([_view(UP), _view(NodeStatus.DOWN), _view(UP, 2)], [DOWN, RETURNED]),
        ([_view(UP), _view(NodeStatus.DOWN), _view(UP, 2, pid=11)], [DOWN, JOINED]),
        ([_view(UP), _view(UP, 2, pid=11)], [DOWN, JOINED]),
        ([_view(UP), _view(UP, 2)], [DOWN, RETURNED]),
        (
            [_view(UP), _view(NodeStatus.DOWN), _view(NodeStatus.SUSPECT, 2), _view(UP, 2)],
            [DOWN, RETURNED],
        ),
        ([_view(NodeStatus.SUSPECT), _view(UP)], [RETURNED]),
    ],
)
def test_what_is_told_follows_from_the_views(
    views: list[dict[str, NodeView]], expected: list[NodeChangeKind]
) -> None:
    """The end of a life always comes before the next one; nothing is told twice."""
    told: Mapping[str, NodeView] = views[0]
    kinds: list[NodeChangeKind] = []
    for now in views[1:]:
        happened, told = differences(told, now, lambda *_: False)
        kinds += [kind for kind, _ in happened]
        assert differences(told, now, lambda *_: False)[0] == []
    assert kinds == expected


def test_a_node_that_said_goodbye_has_left() -> None:
    """The record told is that of the life that ended."""
    happened, _ = differences(_view(UP), _view(UP, 2, pid=11), lambda name, life: life == 1)
    assert [(kind, view.incarnation) for kind, view in happened] == [(LEFT, 1), (JOINED, 2)]


async def test_a_reader_that_does_not_keep_up_loses_the_oldest() -> None:
    """Memory is bounded, and the loss is counted."""
    watcher = Watcher()
    record = NodeRecord(name="n", incarnation=1)
    for number in range(1005):
        watcher.put(NodeChange(JOINED, record, UP, str(number)))
    assert watcher.missed == 5
    assert (await watcher.next()).at == "5"


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """Two nodes, quick to judge."""
    async with TestCluster(nodes=2, workers=1, settings=SETTINGS) as running:
        yield running


class _Seen:
    """What one client was told, collected in the background."""

    def __init__(self, client: Cluster) -> None:
        self.changes: list[NodeChange] = []
        self._task = asyncio.create_task(self._read(client))

    async def _read(self, client: Cluster) -> None:
        async for change in client.nodes.watch(present=True):
            self.changes.append(change)

    def of(self, node: str) -> list[str]:
        """The words about one node."""
        return [str(change.kind) for change in self.changes if change.node == node]

    async def stop(self) -> None:
        """Read no more."""
        self._task.cancel()
        await asyncio.wait({self._task})


@pytest.mark.cluster
@pytest.mark.timeout(90)
async def test_a_client_hears_of_kills_joins_freezes_and_goodbyes(nodes: TestCluster) -> None:
    """With the metadata of the node; a frozen node that thaws has returned."""
    client = nodes.client
    seen = _Seen(client)
    up: list[str] = []
    down: list[NodeChange] = []
    end_up = await client.nodes.on_up(lambda change: up.append(change.node))

    def fails(change: NodeChange) -> None:
        raise RuntimeError("a callback of the user's")

    await client.nodes.on_down(fails)
    await client.nodes.on_down(down.append)
    await eventually(lambda: seen.of("n1") == seen.of("n2") == ["joined"], message="both present")
    assert up == []

    nodes.start_node("n3", "--label", "zone=b", "--capability", "gpu", "--capacity", "slots=7")
    await eventually(lambda: seen.of("n3") == ["joined"], message="n3 has joined")
    record = seen.changes[-1].record
    assert (record.labels, record.capabilities) == ({"zone": "b"}, ["gpu"])
    assert record.capacity["slots"] == 7
    assert up == ["n3"]

    victim = nodes.nodes["n3"]
    victim.kill_all()
    await eventually(lambda: [change.node for change in down] == ["n3"], message="n3 is down")
    assert down[0].kind is DOWN
    assert (down[0].record.labels, down[0].status) == ({"zone": "b"}, NodeStatus.DOWN)
    nodes.start_node("n3", "--label", "zone=c")
    await eventually(lambda: seen.of("n3")[-1] == "joined", message="a new n3")
    assert seen.of("n3") in (["joined", "down", "joined"], ["joined", "suspect", "down", "joined"])
    assert seen.changes[-1].record.labels == {"zone": "c"}

    frozen = nodes.nodes["n2"]
    frozen.pause()
    await eventually(lambda: seen.of("n2")[-1] == "down", timeout=20, message="n2 is given up")
    frozen.resume()

    async def is_back() -> bool:
        return seen.of("n2")[-1] == "returned" and (await client.nodes.get("n2")).status == "up"

    await eventually(is_back, timeout=20, message="n2 is back")
    assert seen.of("n2")[:3] == ["joined", "suspect", "down"]
    # Whether the cluster gave it up too, and so it came back once more, was a close run.
    assert set(seen.of("n2")[3:]) <= {"returned", "down"}

    end_up()
    nodes.nodes["n1"].terminate()
    await nodes.nodes["n1"].wait()
    await eventually(lambda: seen.of("n1") == ["joined", "left"], message="n1 has left")
    assert down[-1].kind is LEFT
    assert up[:3] == ["n3", "n3", "n2"]
    await seen.stop()
