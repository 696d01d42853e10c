"""The tree of causes and effects, put together from envelopes."""

from __future__ import annotations

from typing import Any

from foundation_nats import Agent, Cluster, Signal, on
from foundation_nats.api.journal import build_tree
from foundation_nats.testing import TestCluster, eventually


def _envelope(id: str, cause: str | None = None, time: str = "1") -> dict[str, Any]:
    body = {"id": id, "type": f"t.{id}", "source": "client:c", "subject": "agent:a", "time": time}
    return body if cause is None else {**body, "cause": cause}


def test_effects_hang_from_their_causes_in_the_order_of_time() -> None:
    """Copies of a signal for many are one node."""
    stored = [
        (_envelope("c", "a", "3"), "x"),
        (_envelope("b", "a", "2"), "x"),
        (_envelope("b", "a", "2"), "y"),
        (_envelope("a"), "x"),
        (_envelope("d", "b", "4"), "z"),
    ]
    tree = build_tree(stored, [(_envelope("d", "b", "4"), "z")], "d")
    assert tree is not None
    assert [(depth, node.id, node.agents) for depth, node in tree.walk()] == [
        (0, "a", ["x"]),
        (1, "b", ["x", "y"]),
        (2, "d", ["z"]),
        (1, "c", ["x"]),
    ]
    assert [node.dead for _, node in tree.walk()] == [[], [], ["z"], []]


def test_a_cause_that_is_gone_is_said_to_be_unknown() -> None:
    """And so is one that nobody asked for."""
    tree = build_tree([(_envelope("b", "a"), "x")], [], "b")
    assert tree is not None
    assert (tree.id, tree.is_known, [node.id for node in tree.effects]) == ("a", False, ["b"])
    assert build_tree([(_envelope("b"), "x")], [], "zzz") is None


def test_envelopes_that_lie_in_a_circle_end() -> None:
    """Other programs may write what they like."""
    stored = [(_envelope("a", "b"), "x"), (_envelope("b", "a"), "x"), (_envelope("s", "s"), "x")]
    assert build_tree(stored, [], "a") is not None
    assert build_tree(stored, [], "s") is not None


class Chain(Agent):
    """Hands on what it gets, so often."""

    @on("go")
    def go(self, signal: Signal[int]) -> None:
        """Two effects each, until it is zero."""
        if signal.data:
            for _ in range(2):
                self.emit("go", signal.data - 1, to=f"agent:{self.id}")


async def test_the_tree_of_a_real_signal_is_complete() -> None:
    """From any of its signals."""
    async with TestCluster(nodes=1, workers=1) as nodes:
        client: Cluster = nodes.client
        await client.agents.start(Chain, id="chain")
        await client.send("chain", "other.before", 1)
        receipt = await client.send("chain", "go", 2)

        async def whole() -> bool:
            return len((await client.signals.journal(receipt.id)).walk()) == 7

        await eventually(whole, message="1 + 2 + 4 signals")
        root = await client.signals.journal(receipt.id)
        leaf = root.walk()[-1][1]
        assert (await client.signals.journal(leaf.id)).id == receipt.id
        assert leaf.agents == ["chain"]
