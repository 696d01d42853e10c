"""Actions and plans on real nodes: by capability, and with the worker killed in the middle."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from foundation_nats.errors import ActionError, PayloadInvalidError
from foundation_nats.testing import ScriptedModel, TestCluster, Use, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]


def _lines(sink: Path) -> list[str]:
    return sink.read_text().split("\n")[:-1] if sink.exists() else []


def _kill_workers(nodes: TestCluster) -> None:
    for node in nodes.nodes.values():
        for worker in node.workers():
            worker.send_signal(signal.SIGKILL)


async def test_an_action_is_found_by_its_name_as_a_capability(tmp_path: Path) -> None:
    """With its params checked, and its error told."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        config = {"sink": str(tmp_path / "sink"), "full": "hotel"}
        await client.agents.start("travelling:Traveller", id="ann", config=config)
        assert await client.ask("capability:book", "action.book", {"what": "bus"}) == "bus-1"
        with pytest.raises(PayloadInvalidError, match="what"):
            await client.ask("ann", "action.book", {"where": "bus"})
        with pytest.raises(ActionError, match="no room left"):
            await client.ask("ann", "action.book", {"what": "hotel"})
        tools = await client.ask("ann", "foundation.actions")
        assert [tool["name"] for tool in tools] == ["book", "trip"]


async def test_a_plan_goes_on_where_its_worker_was_killed(tmp_path: Path) -> None:
    """Behind the last step that is done."""
    await _killed_in_a_plan(tmp_path, fails=False)


@pytest.mark.usefixtures("chaos")
async def test_a_plan_goes_on_undoing_where_its_worker_was_killed(tmp_path: Path) -> None:
    """Once it has failed it is never carried forward again."""
    await _killed_in_a_plan(tmp_path, fails=True)


async def _killed_in_a_plan(tmp_path: Path, *, fails: bool) -> None:
    sink = tmp_path / "sink"
    config: dict[str, Any] = {"sink": str(sink)}
    if fails:
        config |= {"full": "hotel", "undo_pause": 1}
    else:
        config |= {"slow": "car", "pause": 1}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("travelling:Traveller", id="ann", config=config)
        receipt = await client.send("ann", "go")
        wanted = ["flight", "car", "uncar"] if fails else ["flight", "car"]
        await eventually(
            lambda: [line.split()[0] for line in _lines(sink)] == wanted, message="it is in a step"
        )
        _kill_workers(nodes)

        async def over() -> bool:
            record = await client.agents.state("ann")
            state = {} if record is None else record["state"]
            return bool(state.get("told") if fails else state.get("trips"))

        await eventually(over, timeout=20, message="the successor ends the plan")
        state = (await client.agents.state("ann") or {})["state"]
        key = f"ann.{receipt.id}.trip"
        times = Counter(_lines(sink))
        if fails:
            assert "undone: car, flight" in state["told"]
            assert times == {
                f"flight {key}/flight": 1,
                f"car {key}/car": 1,
                f"uncar {key}/car:undo": 2,
                f"unflight {key}/flight:undo": 1,
            }
        else:
            assert times == {
                f"flight {key}/flight": 1,
                f"car {key}/car": 2,
                f"hotel {key}/hotel": 1,
            }
        assert await client.agents.steps("ann") == []
        assert await client.dead.list() == []


async def test_an_assistant_killed_in_a_tool_repeats_neither_model_nor_tool(tmp_path: Path) -> None:
    """It goes on with the same words, elsewhere."""
    await _killed_in_a_loop(tmp_path, "tool")


@pytest.mark.usefixtures("chaos")
async def test_an_assistant_killed_while_it_asks_asks_again_with_the_same_key(
    tmp_path: Path,
) -> None:
    """Only that call is made again."""
    await _killed_in_a_loop(tmp_path, "model")


async def _killed_in_a_loop(tmp_path: Path, moment: str) -> None:
    sink = tmp_path / "sink"
    turns = [Use("pay", {"amount": 5}), Use("pay", {"amount": 7}), "Both are paid."]
    async with (
        ScriptedModel(turns) as model,
        TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes,
    ):
        client = nodes.client
        config = {
            "sink": str(sink),
            "model": {"url": model.url, "model": "scripted"},
            "slow": 7 if moment == "tool" else None,
        }
        await client.agents.start("assisting:Assistant", id="ann", critical=True, config=config)
        release = model.hold()
        receipt = await client.send("ann", "say", "pay 5 and 7")
        await eventually(lambda: len(model.requests) == 1, message="the model is asked")
        if moment == "tool":
            release()
            await eventually(lambda: len(_lines(sink)) == 2, message="the second tool runs")
        _kill_workers(nodes)
        release()

        async def answered() -> bool:
            record = await client.agents.state("ann")
            return bool(record and record["state"]["answers"])

        await eventually(answered, timeout=20, message="the successor ends the loop")
        key = f"ann.{receipt.id}.loop"
        assert _lines(sink) == [f"5 {key}/tool-1-1/pay/write", f"7 {key}/tool-2-1/pay/write"]
        assert model.keys == [
            *([f"{key}/model-1"] if moment == "model" else []),
            f"{key}/model-1",
            f"{key}/model-2",
            f"{key}/model-3",
        ]
        assert await client.dead.list() == []
