"""Lists of events become stories: causes are linked, gaps are gaps, and the end says what is next."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from foundation_nats.observe.why import Kind, NodeNow, Numbered, Story, tell
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    ClusterEvent,
    DeploymentStatus,
    PlacementPolicy,
)

BEGAN = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


class Log:
    """Events one second apart, numbered from 1."""

    def __init__(self) -> None:
        self.events: list[Numbered] = []

    @property
    def now(self) -> datetime:
        """One second after the last one."""
        return BEGAN + timedelta(seconds=len(self.events) + 1)

    def add(self, name: str, message: str = "", /, **data: Any) -> int:
        """Append an event; returns its number."""
        topic, _, what = name.partition(".")
        number = len(self.events) + 1
        at = (BEGAN + timedelta(seconds=number)).isoformat()
        event = ClusterEvent(
            topic=topic, what=what, at=at, source="n9", message=message or name, data=data
        )
        self.events.append(Numbered(number, event))
        return number

    def assigned(self, agent: str, target: str, cause: str, epoch: int, /, **data: Any) -> int:
        """A placement of one agent."""
        return self.add(
            "agent.failed_over" if cause == "node_down" else "agent.assigned",
            count=1,
            to={target: 1},
            causes={cause: 1},
            agents={agent: target},
            why={agent: cause},
            epochs={agent: epoch},
            strategies={"load_balanced": 1},
            term=1,
            **{"loads": {target: 1, "n9": 7}, **data},
        )

    def started(
        self, agent: str, node: str, epoch: int, origin: tuple[str, str] | None = None
    ) -> int:
        """An agent that has come to run; *origin* is (node, reason)."""
        recovered = None
        if origin is not None:
            recovered = {"node": origin[0], "epoch": epoch - 1, "reason": origin[1]}
        return self.add(
            "agent.started", agent=agent, node=node, epoch=epoch, recovered_from=recovered
        )

    def failed(self, agent: str, node: str, epoch: int, failures: int, retry_s: float) -> int:
        """A failed start."""
        return self.add(
            "agent.failed",
            agent=agent,
            node=node,
            epoch=epoch,
            reason="on_start raised RuntimeError: no start today",
            failures=failures,
            retry_s=retry_s,
        )


def record(id: str = "visits", **values: Any) -> AgentRecord:
    """A record of one agent."""
    spec = values.pop("spec", None) or AgentSpec(run="m:C")
    return AgentRecord(id=id, spec=spec, **values)


def agent_story(log: Log, held: AgentRecord | None, **values: Any) -> Story:
    """The story of ``visits``."""
    found = tell(
        Kind.AGENT,
        "visits",
        records=[] if held is None else [held],
        events=log.events,
        now=log.now,
        **values,
    )
    assert found is not None
    return found


def links(story: Story) -> list[tuple[int | None, tuple[int, ...]]]:
    """Each sentence's number and its causes."""
    return [(item.event, item.because) for item in story.sentences]


def test_a_node_that_dies_moves_its_agents_and_each_step_names_its_cause() -> None:
    """Applied, placed, started, node down, placed elsewhere, started there."""
    log = Log()
    log.add("deployment.applied", names=["visits"])
    log.assigned("visits", "n1", "new", 1)
    log.started("visits", "n1", 1)
    log.assigned("other", "n1", "new", 1)
    log.add("node.down", node="n3", cause="silence")
    log.add("node.down", node="n1", cause="no_responders")
    log.assigned("visits", "n2", "node_down", 2, node="n1", ms=3.5)
    log.started("visits", "n2", 2, ("n1", "node_down"))
    story = agent_story(log, record(status=AgentStatus.RUNNING, node="n2", epoch=2))
    assert links(story) == [
        (1, ()),
        (2, (1,)),
        (3, (2,)),
        (6, ()),
        (7, (6,)),
        (8, (7,)),
        (None, (8,)),
    ]
    texts = [item.text for item in story.sentences]
    assert texts[1] == (
        "It was placed on n1 by load_balanced (n1 had 1 agent, n9 7), because it had not run before."
    )
    assert texts[3] == "n1, where it was, went down (nobody answers for it)."
    assert "because n1 is down, 3.5 ms after that was known" in texts[4]
    assert texts[5] == "It started on n2, epoch 2, going on where n1 had left off."
    assert texts[6] == "It runs on n2, epoch 2."
    assert (story.status, story.next) == ("running", ())
    assert [item.at for item in story.sentences] == sorted(item.at for item in story.sentences)


def test_a_leader_that_dies_is_followed_by_the_one_that_tells_of_it() -> None:
    """The election comes first, as the cause."""
    log = Log()
    log.add("leader.elected", node="n1", term=1)
    log.assigned("visits", "n1", "new", 1)
    log.started("visits", "n1", 1)
    log.add("leader.elected", node="n2", term=2)
    log.add("node.down", node="n1", cause="no_responders")
    log.assigned("visits", "n2", "node_down", 2, node="n1")
    story = agent_story(log, record(status=AgentStatus.STARTING, node="n2", epoch=2))
    assert links(story)[2:5] == [(4, ()), (5, (4,)), (6, (4, 5))]
    assert story.sentences[2].text == "n2 became leader (term 2) instead of n1."
    assert story.status == "starting"


def test_a_pending_agent_tells_why_per_node_and_what_would_help() -> None:
    """The reasons are those of the last look; a node that joins ends it."""
    spec = AgentSpec(run="m:C", placement=PlacementPolicy(require=["gpu"]), resources={"gpu": 2})
    log = Log()
    log.add("deployment.applied", names=["visits"])
    log.add(
        "agent.pending",
        agents={"visits": None},
        reason="no node qualifies: n1 lacks the capability gpu",
        reasons={"n1": "lacks the capability gpu"},
    )
    reason = "no node qualifies: n1 is down; n2 is cordoned"
    log.add(
        "agent.pending",
        agents={"visits": None},
        reason=reason,
        reasons={"n1": "is down", "n2": "is cordoned"},
    )
    held = record(status=AgentStatus.PENDING, reason=reason, spec=spec)
    nodes = {"n1": NodeNow("down"), "n2": NodeNow("up", cordon="repair")}
    story = agent_story(log, held, nodes=nodes)
    assert story.status == "pending"
    assert story.reasons == {"n1": "is down", "n2": "is cordoned"}
    assert links(story) == [(1, ()), (2, (1,)), (3, (2,)), (None, (3,))]
    assert story.next == (
        "It starts as soon as a node is up that offers gpu and has 2 gpu left.",
        "n1 is down: it counts again once it is back.",
        "n2 is cordoned: `foundation uncordon n2`.",
    )
    # The leader may tell of the placement before the node tells that it has joined.
    log.assigned("visits", "n3", "waited", 1)
    log.add("node.joined", "Node n3 joined.", node="n3")
    log.started("visits", "n3", 1)
    story = agent_story(log, record(status=AgentStatus.RUNNING, node="n3", epoch=1, spec=spec))
    assert links(story)[3:6] == [(5, ()), (4, (3, 5)), (6, (4,))]
    assert "because n3 qualifies now" in story.sentences[4].text
    assert story.reasons == {}


def test_a_crash_loop_tells_failures_and_the_next_try_and_is_cut_short() -> None:
    """A hundred tries are no hundred sentences."""
    log = Log()
    log.add("deployment.applied", names=["visits"])
    log.assigned("visits", "n1", "new", 1)
    for failures in range(1, 31):
        log.failed("visits", "n1", failures, failures, 60.0)
        log.assigned("visits", "n1", "retry", failures + 1)
    last = log.failed("visits", "n1", 31, 31, 60.0)
    held = record(status=AgentStatus.FAILED, node="n1", epoch=31, failures=31, reason="no start")
    story = agent_story(log, held)
    assert len(story.sentences) == 8
    assert "and so on, 29 more failed tries" in story.sentences[4].text
    assert story.sentences[-2].event == last
    assert story.sentences[-1].text == "It failed 31 times in a row, last: no start."
    assert story.next[0].startswith("The next try is due in 59 s;")
    assert "--release" in story.next[1]


def test_a_quarantined_agent_is_released_by_hand() -> None:
    """It says how."""
    log = Log()
    log.failed("visits", "n1", 1, 10, 60.0)
    log.add("agent.quarantined", agent="visits", failures=10, reason="quarantined after 10 …")
    held = record(
        status=AgentStatus.FAILED, failures=10, reason="quarantined after 10 failed starts: no"
    )
    story = agent_story(log, held)
    assert "in quarantine" in story.sentences[-1].text
    assert "`foundation agent visits --release`" in story.next[0]


def test_what_a_node_tells_too_early_is_put_after_its_cause() -> None:
    """A start may be stored before the assignment it follows."""
    log = Log()
    log.started("visits", "n1", 1)
    log.assigned("visits", "n1", "new", 1)
    story = agent_story(log, record(status=AgentStatus.RUNNING, node="n1", epoch=1))
    assert links(story) == [(2, ()), (1, (2,)), (None, (1,))]


def test_a_worker_that_died_is_told_to_those_that_were_in_it() -> None:
    """By name; where there were too many to name, if the agent says so when it starts."""
    log = Log()
    log.started("visits", "n1", 1)
    log.add("worker.died", node="n1", worker="n1-w0", cause="signal 9", agents=1, lost=["x"])
    log.add("worker.died", node="n2", worker="n2-w0", cause="signal 9", agents=9, lost=[])
    log.add(
        "worker.died",
        node="n1",
        worker="n1-w1",
        cause="signal 11",
        agents=900,
        lost=["x"],
        suspect="x",
    )
    log.started("visits", "n1", 2, ("n1", "worker_died"))
    story = agent_story(log, record(status=AgentStatus.RUNNING, node="n1", epoch=2))
    assert links(story) == [(1, ()), (4, ()), (5, (4,)), (None, (5,))]
    assert "ended (signal 11) while x was handling a signal" in story.sentences[1].text
    assert "in a new worker process" in story.sentences[2].text


def test_a_move_is_told_once_with_the_draining_that_caused_it() -> None:
    """The node that lets go writes the assignment itself, and the leader tells of it afterwards."""
    log = Log()
    log.started("visits", "n1", 1)
    log.add("node.draining", "Node n1 hands over its agents.", node="n1")
    log.started("visits", "n2", 2, ("n1", "moved"))
    log.add("agent.moved", agents={"visits": "n2"}, to={"n2": 1}, sources=["n1"], count=1)
    log.add("node.left", node="n1")
    story = agent_story(log, record(status=AgentStatus.RUNNING, node="n2", epoch=2))
    assert links(story) == [(1, ()), (2, ()), (3, (1, 2)), (None, (3,))]


def test_events_that_lack_everything_make_a_poor_story_and_no_error() -> None:
    """Of an earlier version, or of somebody else: what is missing is left out."""
    log = Log()
    for what in ("assigned", "failed_over", "moved", "started", "failed", "pending", "strange"):
        log.add(f"agent.{what}", agent="visits")
        log.add(f"agent.{what}", agents={"visits": None}, why="no mapping", loads=[1])
    for name in ("node.down", "worker.died", "deployment.applied", "cluster.storm"):
        log.add(name)
    story = agent_story(log, None)
    assert story.status == "absent"
    assert story.sentences[-1].text == "Nobody wants visits now, and it runs nowhere."
    for kind in (Kind.DEPLOYMENT, Kind.NODE):
        tell(kind, "visits", records=[], events=log.events, now=log.now)


def test_nobody_has_no_story() -> None:
    """Neither a record, nor a wish, nor an event."""
    log = Log()
    log.add("deployment.applied", names=["other"])
    for kind in Kind:
        assert tell(kind, "visits", records=[], events=log.events, now=log.now) is None


def test_a_deployment_tells_of_its_agents_together() -> None:
    """Starts in a row are one sentence; what doesn't run has its reason and its next step."""
    log = Log()
    log.add("deployment.applied", names=["c", "d"])
    agents = {f"c-{number}": "n1" for number in range(3)}
    log.add("agent.assigned", agents=agents, why=dict.fromkeys(agents, "new"), to={"n1": 3})
    for number in range(3):
        log.started(f"c-{number}", "n1", 1)
    log.started("d", "n1", 1)
    log.add("deployment.scaled", "c goes from 3 to 4 replicas.", name="c", before=3, after=4)
    log.add(
        "agent.pending",
        agents={"c-3": None, "e": None},
        reason="n1 is full",
        reasons={"n1": "full"},
    )
    log.add("node.down", node="n2", cause="silence")
    log.add("node.down", node="n1", cause="silence")
    records = [
        record(f"c-{number}", deployment="c", status=AgentStatus.RUNNING, node="n1")
        for number in range(3)
    ]
    records.append(record("c-3", deployment="c", status=AgentStatus.PENDING, reason="n1 is full"))
    status = DeploymentStatus(
        name="c", run="m:C", desired=4, running=3, pending=1, reasons={"c-3": "n1 is full"}
    )
    story = tell(
        Kind.DEPLOYMENT, "c", records=records, events=log.events, status=status, now=log.now
    )
    assert story is not None
    assert [item.text for item in story.sentences] == [
        "c was applied by n9.",
        "c-0, c-1, c-2 were placed on n1.",
        "c-0, c-1, c-2 started on n1.",
        "c goes from 3 to 4 replicas.",
        "c-3 was pending: n1 is full.",
        "n1 went down, with c-0, c-1, c-2.",
        "3 of 4 agents run; 1 pending.",
    ]
    assert story.reasons == {"c-3": "n1 is full"}
    assert story.next[0] == "c-3: It starts as soon as a node is up that has room."


def test_a_node_tells_of_its_life() -> None:
    """Joined, led, was given agents, went down, what became of them."""
    log = Log()
    log.add("node.joined", "Node n1 joined.", node="n1")
    log.add("leader.elected", "Node n1 leads in term 3.", node="n1", term=3)
    log.assigned("a", "n1", "new", 1)
    log.assigned("b", "n1", "new", 1)
    log.add("node.suspect", "Node n1 is not heard.", node="n1", cause="silence")
    log.add("node.down", node="n1", cause="silence")
    log.add("agent.failed_over", "2 agents of n1 placed on n2.", node="n1", to={"n2": 2}, ms=4.0)
    story = tell(
        Kind.NODE,
        "n1",
        records=[record("c", status=AgentStatus.UNAVAILABLE, node="n1")],
        events=log.events,
        nodes={"n1": NodeNow("down")},
        now=log.now,
    )
    assert story is not None
    assert links(story) == [(1, ()), (2, ()), (4, ()), (5, ()), (6, (5,)), (7, (6,)), (None, (7,))]
    assert story.sentences[2].text == "It was given 2 agents."
    assert story.sentences[-1].text == "n1 is down, and 1 agent waits for its return."
    assert "foundation node start --name n1" in story.next[0]
