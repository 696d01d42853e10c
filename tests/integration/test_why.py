"""`why` on a real cluster: what happened is what is told, in order, with its causes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest

from foundation_nats import Cluster
from foundation_nats.errors import ConfigError, NotFoundError
from foundation_nats.observe.why import Story
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_MANIFEST = """
version: 1
agents:
  - {name: visits, run: "fleet:Counter", critical: true}
  - {name: model, run: "fleet:Counter", placement: {require: [gpu]}}
  - {name: bad, run: "fleet:Difficult", config: {fail_start: true}}
"""


def whats(story: Story) -> list[str]:
    """The kinds of the sentences."""
    return [item.what for item in story.sentences]


async def status_of(cluster: Cluster, agent: str) -> str:
    """An agent's status, `absent` if there is no record yet."""
    found = {item.id: item.status for item in await cluster.agents.list()}
    return str(found.get(agent, "absent"))


async def test_stories_of_a_cluster_that_loses_a_node_and_gains_another() -> None:
    """Down, moved, started; pending per node until one joins; failures and the next try."""
    settings = {"control": {"failed_backoff_s": 0.3}}
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        client = nodes.client
        await client.deployments.apply(_MANIFEST)
        await eventually(lambda: _is(client, "visits", "running"), timeout=15)
        first = (await client.agents.get("visits")).node
        assert first is not None

        # An agent that no node can take tells why, per node.
        await eventually(lambda: _is(client, "model", "pending"), timeout=15)
        story = await client.why("model")
        assert story.status == "pending"
        assert story.reasons == dict.fromkeys(("n1", "n2"), "lacks the capability gpu")
        assert story.next[0] == "It starts as soon as a node is up that offers gpu."
        assert whats(story) == ["deployment.applied", "agent.pending", "now"]

        # A crash loop tells what failed how often, and when it is tried again.
        async def has_failed_twice() -> bool:
            return (await client.agents.get("bad")).failures >= 2

        await eventually(has_failed_twice, timeout=15, message="two failures")
        story = await client.why("bad")
        failed = [item for item in story.sentences if item.what == "agent.failed"]
        assert "first failure" in failed[0].text
        assert "no start today" in failed[0].text
        assert "failure 2 in a row; to be tried again after 1.2 s" in failed[1].text
        if story.status == "failed":
            assert "The next try is due" in story.next[0]

        # The node of an agent dies.
        nodes.nodes[first].kill_all()
        second = "n1" if first == "n2" else "n2"

        async def has_moved() -> bool:
            found = await client.agents.get("visits")
            return (found.node, found.status) == (second, "running")

        await eventually(has_moved, timeout=20, message="failover")

        async def is_told() -> Story | None:
            found = await client.why("visits")
            return found if whats(found).count("agent.started") == 2 else None

        found = await eventually(is_told, timeout=10, message="the story is complete")
        assert found is not None
        told = [item for item in found.sentences if item.what != "leader.elected"]
        assert [item.what for item in told] == [
            "deployment.applied",
            "agent.assigned",
            "agent.started",
            "node.down",
            "agent.failed_over",
            "agent.started",
            "now",
        ]
        for cause, item in itertools.pairwise(told):
            if item.what != "node.down":  # that has no cause but itself
                assert cause.event in item.because
        assert f"because {first} is down" in told[4].text
        assert told[-1].text == f"It runs on {second}, epoch 2."
        story = await client.why(first)
        assert "node.down" in whats(story)
        assert story.status == "down"
        story = await client.why("deployment:visits")
        assert story.status == "settled"
        assert any(
            item.text.startswith(f"{first} went down, with visits") for item in story.sentences
        )

        # A node with the capability joins.
        nodes.start_node("n3", "--capability", "gpu")
        await eventually(lambda: _is(client, "model", "running"), timeout=20)

        async def joined_is_told() -> Story | None:
            found = await client.why("model")
            return found if "agent.started" in whats(found) else None

        found = await eventually(joined_is_told, timeout=10, message="the start is told")
        assert found is not None
        assert whats(found)[-4:] == ["node.joined", "agent.assigned", "agent.started", "now"]
        assert "because n3 qualifies now" in found.sentences[-3].text
        assert found.sentences[-4].event in found.sentences[-3].because

        # By the command, and what nobody knows.
        env = {**os.environ, **nodes.config.to_environment()}
        code, out, _ = run(env, "why", "visits", "-o", "json")
        assert code == 0
        document = json.loads(out)
        assert document["schema"] == "foundation/v1/why"
        assert {"kind", "name", "status", "sentences", "next", "reasons", "is_cut"} <= set(document)
        assert {"at", "text", "what", "event", "because"} == set(document["sentences"][0])
        code, out, _ = run(env, "why", "model")
        assert code == 0
        assert "n3 qualifies now" in out
        code, _, err = run(env, "why", "visit", "-o", "json")
        assert code == 4
        assert "'visits'" in json.loads(err)["error"]["hint"]
        with pytest.raises(NotFoundError):
            await client.why("node:visits")
        with pytest.raises(ConfigError):
            await client.why("capability:gpu")

        # What is gone still has its story.
        await client.agents.stop("visits")
        story = await client.why("agent:visits")
        assert story.status == "absent"
        assert "agent.failed_over" in whats(story)


async def _is(cluster: Cluster, agent: str, status: str) -> bool:
    return await status_of(cluster, agent) == status


def run(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """A command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "foundation_cli.main", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout, done.stderr
