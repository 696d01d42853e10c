"""Steps of `ctx.once` when the worker that does them is killed: what is known to be done stays done."""

from __future__ import annotations

import signal
from collections import Counter
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


@pytest.mark.parametrize("point", ["step.begun", "step.happened", "step.done"])
async def test_a_worker_that_dies_anywhere_in_a_step_repeats_what_is_in_doubt_alone(
    point: str, tmp_path: Path
) -> None:
    """Every step is done, none more often than workers have died, and the totals are exact."""
    sink = tmp_path / "sink"
    crashes = {"FOUNDATION_FAILPOINTS": f"{point}=after(25,kill)"}
    # Agents of one worker die in the middle of one another's steps.
    count, agents = (40, 4) if point != "step.done" else (20, 1)
    async with TestCluster(nodes=1, workers=2, path=[str(AGENTS)], environment=crashes) as nodes:
        client = nodes.client
        for number in range(agents):
            await client.agents.start(
                "careful:Teller", id=f"teller-{number}", config={"sink": str(sink)}
            )
        (node,) = nodes.nodes.values()
        first = {worker.pid for worker in node.workers()}
        receipts = [
            await client.send(f"teller-{n % agents}", "pay", 1, timeout=20) for n in range(count)
        ]

        async def all_paid() -> bool:
            records = [await client.agents.state(f"teller-{n}") for n in range(agents)]
            return sum(r["state"]["paid"] for r in records if r is not None) == count

        await eventually(all_paid, timeout=60, message="every signal takes effect once")
        assert first != {worker.pid for worker in node.workers()}, "nothing has crashed"
        keys = Counter(line.partition(" ")[2] for line in _lines(sink))
        wanted = {
            f"teller-{n % agents}.{receipt.id}.{step}"
            for n, receipt in enumerate(receipts)
            for step in ("first", "second", "third")
        }
        assert set(keys) == wanted
        again = sum(times - 1 for times in keys.values())
        if point == "step.done":
            assert again == 0, "what is known to be done is not done again"
        assert await client.dead.list() == []
