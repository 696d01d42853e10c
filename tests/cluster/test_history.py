"""Handled signals that stay, and what a replay makes of them: the very states that there were."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from foundation_nats import Cluster
from foundation_nats.api.history import Outcome
from foundation_nats.errors import NotFoundError
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.replay import Replay, ReplayOutcome, replay
from tests.agents.fleet import Counter
from tests.agents.rememberer import Tally
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_QUICK = {
    "mailbox": {"trim_min_age_s": 0.05, "trim_every_s": 0.1, "mailbox_max": 64},
}


async def handled(client: Cluster, agent: str, cursor: int) -> None:
    """Wait until everything up to *cursor* was handled."""

    async def there() -> bool:
        state = await client.agents.state(agent)
        return state is not None and state["cursor"] >= cursor

    await eventually(there, timeout=15, message=f"{agent} has handled up to {cursor}")


async def send(client: Cluster, amounts: list[int]) -> list[int]:
    """Their sequences."""
    return [
        (await client.send("tally", "tally.add", {"amount": amount})).sequence for amount in amounts
    ]


async def again(client: Cluster, **options: Any) -> Replay:
    return await replay(await client.agents.recording("tally"), Tally, **options)


async def test_the_past_of_an_agent_stays_and_is_replayed_as_it_was(tmp_path: Path) -> None:
    """Through trimming, a dead letter, a crash of its worker, a step, a question."""
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=_QUICK) as cluster:
        client = cluster.client
        secret = tmp_path / "outside"
        await client.agents.start("rememberer:Tally", id="tally", config={"file": str(secret)})
        await client.agents.start("rememberer:Tally", id="mirror")
        amounts = list(range(1, 31))
        sequences: list[int] = []
        for start in range(0, 30, 6):
            # A few at a time: one commit of all would be a base with nothing behind it.
            sequences += await send(client, amounts[start : start + 6])
            await handled(client, "tally", sequences[-1])

        async def trimmed() -> bool:
            history = await client.agents.history("tally")
            assert history.kept >= 5
            return history.kept < 30

        await eventually(trimmed, timeout=15, message="what is old is trimmed")
        totals = dict(zip(sequences, accumulate(amounts), strict=True))
        found = await again(client)
        assert found.exact, found.remarks
        assert found.begins_at > sequences[0]
        assert len(found.steps) >= 5
        assert {step.sequence: step.state["total"] for step in found.steps} == {
            number: total for number, total in totals.items() if number > found.begins_at
        }
        assert all(step.emitted == 1 for step in found.steps)
        middle = sequences[-3]
        assert (await again(client, until=middle)).state["total"] == totals[middle]
        for outside in (0, sequences[-1] + 100):
            with pytest.raises(NotFoundError):
                await again(client, until=outside)

        # What was given up took no effect, then and now.
        await client.send("tally", "tally.boom")
        (last,) = await send(client, [100])
        await handled(client, "tally", last)
        found = await again(client)
        assert found.exact, found.remarks
        assert found.state["total"] == sum(amounts) + 100
        assert ReplayOutcome.VOID in {step.outcome for step in found.steps}
        history = await client.agents.history("tally", effects=True)
        by_sequence = {signal.sequence: signal for signal in history.signals}
        assert [s.outcome for s in history.signals][-2:] == [Outcome.DEAD, Outcome.HANDLED]
        assert history.signals[-2].dead_number is not None
        assert [effect.type for effect in by_sequence[last].effects or ()] == ["tally.added"]
        assert history.replay_from == found.begins_at

        # Another activation goes on with the same past.
        cluster.nodes["n1"].workers()[0].kill()
        more = await send(client, [7] * 12)
        await handled(client, "tally", more[-1])
        found = await again(client)
        assert found.exact, found.remarks
        assert found.steps[-1].state["total"] == sum(amounts) + 100 + 84

        # A step is not done again, and what reaches outside is refused: it is said, not guessed.
        receipt = await client.send("tally", "tally.pay", {"amount": 50})
        for type_ in ("tally.call", "tally.write"):
            receipt = await client.send("tally", type_)
        await handled(client, "tally", receipt.sequence)
        assert secret.read_text() == "was here"
        secret.unlink()
        found = await again(client)
        assert not found.exact
        refused = [s for s in found.steps if s.outcome is ReplayOutcome.REFUSED]
        assert [s.type for s in refused] == ["tally.pay", "tally.call", "tally.write"]
        assert set(found.checks[-1].differs) == {"count", "paid"}
        assert not secret.exists()
        found = await again(client, allow_outside=True)
        assert found.exact, found.remarks
        assert secret.exists()

        # A question is in no mailbox: until a base lies behind it, the replay is incomplete.
        await client.ask("tally", "tally.add", {"amount": 1000})
        found = await again(client, allow_outside=True)
        assert (found.asides, found.exact) == (1, False)
        assert "total" in found.checks[-1].differs


async def test_a_setting_says_it_for_all_but_those_that_keep_no_state(tmp_path: Path) -> None:
    settings = {"mailbox": {"history": 2}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as cluster:
        client = cluster.client
        await client.agents.start("fleet:Counter", id="plain")
        await client.agents.start("fleet:Forgetful", id="forgetful", durable=False)
        for amount in (1, 2, 3):
            receipt = await client.send("plain", "counter.add", {"amount": amount})
        await handled(client, "plain", receipt.sequence)
        history = await client.agents.history("plain")
        assert [signal.outcome for signal in history.signals] == [Outcome.HANDLED] * 3
        assert history.replay_from is not None
        found = await replay(await client.agents.recording("plain"), Counter)
        assert found.exact, found.remarks
        assert (found.begins_with["total"], found.state["total"]) == (0, 6)
        with pytest.raises(NotFoundError):
            await client.agents.recording("forgetful")
        with pytest.raises(NotFoundError):
            await client.agents.history("nobody")
