"""Steps of `ctx.once` when the worker that does them is killed: what is known to be done stays done."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]


def _lines(sink: Path) -> list[str]:
    return sink.read_text().split("\n")[:-1] if sink.exists() else []


async def test_a_killed_worker_repeats_only_the_step_in_doubt(tmp_path: Path) -> None:
    """Two steps are done, the third has happened and nobody knows: its key is the same again."""
    sink = tmp_path / "sink"
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        agents = nodes.client.agents
        await agents.start(
            "careful:Teller", id="teller", critical=True, config={"sink": str(sink), "pause": 3}
        )
        receipt = await nodes.client.send("teller", "pay", 5)
        await eventually(lambda: len(_lines(sink)) == 3, message="the third step has happened")
        remembered = {step.key: step.status for step in await agents.steps("teller")}
        assert remembered == {"first": "done", "second": "done", "third": "pending"}
        node = (await agents.get("teller")).node
        assert node is not None
        for worker in nodes.nodes[node].workers():
            worker.send_signal(signal.SIGKILL)

        async def paid() -> bool:
            record = await agents.state("teller")
            return record is not None and record["state"]["paid"] == 5

        await eventually(paid, timeout=20, message="the successor finishes the signal")
        key = f"teller.{receipt.id}"
        assert _lines(sink) == [
            f"first {key}.first",
            f"second {key}.second",
            f"third {key}.third",
            f"third {key}.third",
        ]
        assert await agents.steps("teller") == []


async def test_a_step_in_doubt_waits_for_a_person(tmp_path: Path) -> None:
    """It becomes a dead letter at once, and goes on by what the person says."""
    sink = tmp_path / "sink"
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start(
            "careful:Teller", id="teller", config={"sink": str(sink), "pause": 30}
        )
        await client.send("teller", "pay.careful", 5)
        await eventually(lambda: len(_lines(sink)) == 1, message="the step has happened")
        (node,) = nodes.nodes.values()
        for worker in node.workers():
            worker.send_signal(signal.SIGKILL)

        async def given_up() -> bool:
            return bool(await client.dead.list("teller"))

        await eventually(given_up, timeout=20, message="the signal is given up")
        (letter,) = await client.dead.list("teller")
        assert letter.letter.code == "agent.step_in_doubt"
        step = await client.agents.resolve_step("teller", "only", done=True, result="ONLY")
        assert step.status == "done"
        await client.dead.replay(letter.number)

        async def paid() -> bool:
            record = await client.agents.state("teller")
            return record is not None and record["state"]["paid"] == 5

        await eventually(paid, timeout=10, message="the replay goes on behind the step")
        assert len(_lines(sink)) == 1
        assert await client.agents.steps("teller") == []
