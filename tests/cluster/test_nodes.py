"""`cluster.nodes`: the view of all at once, more and fewer nodes from a program; who runs where."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation_nats.errors import ConfigError, NodeNotFoundError
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import NodeStatus
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def test_a_program_takes_a_view_adds_nodes_and_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view never changes, and the next one is newer; a removed node's agents go elsewhere first."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(AGENTS))
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        before = await cluster.nodes.view()
        assert set(before.nodes) == {"n1"}
        with pytest.raises(ConfigError, match="begin a node's name"):
            await cluster.nodes.add(prefix="no.name")
        with pytest.raises(ConfigError, match="no launcher 'moon'"):
            await cluster.nodes.add(launcher="moon")
        (added,) = await cluster.nodes.add(prefix="more", workers=1, capabilities=["gpu"])
        try:
            assert (added.name, added.status, added.capabilities) == ("more-1", "up", ["gpu"])

            async def seen() -> bool:
                view = (await cluster.nodes.view()).get("more-1")
                return view is not None and view.status is NodeStatus.UP

            await eventually(seen, message="the view has it")
            after = await cluster.nodes.view()
            assert after.revision > before.revision
            assert set(before.nodes) == {"n1"}
            assert [view.name for view in after.having("gpu")] == ["more-1"]
            await cluster.agents.start("fleet:Counter", id="a", placement={"prefer": ["gpu"]})
            await cluster.agents.start(
                "fleet:Counter", id="b", placement={"require": ["tpu"]}, wait=False
            )

            async def placed() -> bool:
                found = await cluster.agents.by_node()
                return {None, "more-1"} <= found.keys()

            await eventually(placed, message="one runs there, one has no node")
            found = await cluster.agents.by_node()
            assert {node: [info.id for info in infos] for node, infos in found.items()} == {
                "more-1": ["a"],
                None: ["b"],
            }
            with pytest.raises(NodeNotFoundError, match="nowhere"):
                await cluster.nodes.remove("nowhere")
        finally:
            (removed,) = await cluster.nodes.remove("more-1")
        assert removed.drained
        assert (await cluster.agents.get("a")).node == "n1"
