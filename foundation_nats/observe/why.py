"""`tell`: why an agent, a deployment or a node is as it is, as one story in order of time.

Pure. Sentences come from events, each with the number of its event in the
stream EVENTS and the numbers of those that caused it; the last one says what
holds now, from the records, and `Story.next` what would change it.

Not guaranteed: completeness. Events are told without waiting and may be lost
with a connection, a batch names at most 50 agents, and the stream forgets what
is old. A gap shows as a missing cause, never as a wrong one: what is now comes
from the records alone. Events of two nodes may be stored in another order than
they happened; where the order matters for a cause, both neighbours are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from foundation_schemas import AgentRecord, AgentStatus, ClusterEvent, DeploymentStatus

_LOOP_MAX = 8
"""Failed tries in a row that are told one by one; of more, the first two and the last two."""
_SOON_S = 5.0
"""Two nodes may tell of one happening in any order within this."""
_NAMED_MAX = 5
_AGENTS_NEXT_MAX = 3
_QUARANTINED = "quarantined"


class Kind(StrEnum):
    """What a story is about."""

    AGENT = "agent"
    DEPLOYMENT = "deployment"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event and its number in the stream."""

    number: int
    event: ClusterEvent


@dataclass(frozen=True, slots=True)
class NodeNow:
    """What is known of a node now."""

    status: str
    agents: int = 0
    cordon: str | None = None
    """Why it gets no new agents; None: it gets some."""
    is_leader: bool = False
    short_lives: int | None = None
    """It flaps: so many of its last lives were short; None: it is trusted."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One thing that happened."""

    at: str
    text: str
    what: str
    """``topic.what`` of the event; ``now`` for what holds now."""
    event: int | None = None
    because: tuple[int, ...] = ()
    """The events that caused it."""


@dataclass(frozen=True, slots=True)
class Story:
    """What led to the present condition, and what would change it."""

    kind: Kind
    name: str
    status: str
    sentences: tuple[Sentence, ...]
    """Oldest first; the last one says what holds now."""
    next: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Of a pending agent: node to why it doesn't qualify; of a deployment: agent to why it
    doesn't run."""
    is_cut: bool = False
    """There are older events that were not looked at, or are not kept any more."""


def tell(
    kind: Kind,
    name: str,
    *,
    records: Sequence[AgentRecord],
    events: Sequence[Numbered],
    status: DeploymentStatus | None = None,
    nodes: Mapping[str, NodeNow] | None = None,
    now: datetime,
    is_cut: bool = False,
) -> Story | None:
    """The story of *name*; None: nobody knows it.

    Args:
        records: of the agent; of the deployment's agents; of the agents on the node.
        events: in the order of the stream.
        status: of the deployment, or of the one the agent belongs to; None: nobody wants it.
        nodes: those that are there now.
    """
    known = nodes or {}
    events = _wishes_first(events)
    match kind:
        case Kind.AGENT:
            record = next((item for item in records if item.id == name), None)
            story = _agent(name, record, events, status, known, now)
        case Kind.DEPLOYMENT:
            story = _deployment(name, records, events, status, known, now)
        case Kind.NODE:
            story = _node(name, records, events, known, now)
    return None if story is None else replace(story, is_cut=is_cut)


def _wishes_first(events: Sequence[Numbered]) -> list[Numbered]:
    """Put each wish before what it led to: it is announced once it was written, and thus later."""
    found: list[Numbered] = []
    for item in events:
        place = len(found)
        if item.event.topic == "deployment":
            while (
                place
                and found[place - 1].event.topic == "agent"
                and 0 <= _apart(item.event.at, found[place - 1].event.at) <= _SOON_S
            ):
                place -= 1
        found.insert(place, item)
    return found


# ---- words --------------------------------------------------------------------------


def _at(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None


def _apart(first: str, second: str) -> float:
    """Seconds from the first time to the second; 0 where one of them is none."""
    one, other = _at(first), _at(second)
    return 0.0 if one is None or other is None else (other - one).total_seconds()


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _list(names: Iterable[str], most: int = _NAMED_MAX) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _clause(text: object) -> str:
    """A reason as part of a sentence."""
    return str(text or "no reason was given").strip().rstrip(".")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(value: object) -> Sequence[str]:
    return value if isinstance(value, list | tuple) else ()


def _chosen_by(data: Mapping[str, Any], node: str) -> str:
    """By which strategy, and among which nodes, as far as the event says."""
    strategies = list(_mapping(data.get("strategies")))
    loads = dict(_mapping(data.get("loads")))
    parts = []
    if len(strategies) == 1:
        parts.append(f"by {strategies[0]}")
    if len(loads) > 1 and node in loads:
        others = sorted((load, name) for name, load in loads.items() if name != node)
        shown = _list((f"{name} {load:g}" for load, name in others), 3)
        parts.append(f"({node} had {_count(loads[node], 'agent')}, {shown})")
    return " " + " ".join(parts) if parts else ""


def _cause(text: str) -> str:
    return {"no_responders": "nobody answers for it", "silence": "it is not heard"}.get(text, text)


def _needs(record: AgentRecord) -> str:
    """What a node must be like to take the agent."""
    policy = record.spec.placement
    parts = [f"offers {name}" for name in policy.require]
    parts += [f"is labelled {key}={value}" for key, value in sorted(policy.labels.items())]
    parts += [f"satisfies {text!r}" for text in policy.expressions]
    parts += [
        f"has {amount:g} {name} left" for name, amount in sorted(record.spec.resources.items())
    ]
    return " and ".join(parts) or "has room"


# ---- looking around ---------------------------------------------------------------------


@dataclass(slots=True)
class _Around:
    """What happened to nodes and deployments, to find causes in."""

    events: Sequence[Numbered]
    of_node: dict[str, list[Numbered]] = field(default_factory=dict)
    started: dict[str, list[Numbered]] = field(default_factory=dict)
    elected: list[Numbered] = field(default_factory=list)

    def __post_init__(self) -> None:
        for item in self.events:
            event = item.event
            match event.topic, event.what:
                case "node", _:
                    node = str(event.data.get("node"))
                    self.of_node.setdefault(node, []).append(item)
                case "agent", "started":
                    agent = str(event.data.get("agent"))
                    self.started.setdefault(agent, []).append(item)
                case "leader", "elected":
                    self.elected.append(item)

    def last(self, node: str, what: tuple[str, ...], since: str, until: str) -> Numbered | None:
        """The latest of these events of a node, about between two times."""
        for item in reversed(self.of_node.get(node, ())):
            if (
                item.event.what in what
                and _apart(since, item.event.at) >= -_SOON_S
                and _apart(item.event.at, until) >= -_SOON_S
            ):
                return item
        return None

    def next_start(self, agent: str, after: int) -> Numbered | None:
        return next((i for i in self.started.get(agent, ()) if i.number > after), None)

    def leader_lost(self, down: Numbered) -> Numbered | None:
        """The election that the death of the leader led to, if that is what *down* tells of.

        Only the new leader tells that the old one is down.
        """
        lost = str(down.event.data.get("node"))
        for before, item in zip(self.elected, self.elected[1:], strict=False):
            if (
                before.event.data.get("node") == lost != item.event.data.get("node")
                and abs(_apart(item.event.at, down.event.at)) <= _SOON_S
            ):
                return item
        return None


@dataclass(slots=True)
class _Draft:
    """The sentences so far."""

    sentences: list[Sentence] = field(default_factory=list)
    loops: set[int] = field(default_factory=set)
    """Numbers of sentences that tell of one more failed try."""
    told: set[int] = field(default_factory=set)

    def add(
        self, item: Numbered, text: str, because: Iterable[int] = (), loop: bool = False
    ) -> int:
        if item.number in self.told:
            return item.number
        event = item.event
        causes = tuple(number for number in dict.fromkeys(because) if number in self.told)
        self.told.add(item.number)
        what = f"{event.topic}.{event.what}"
        self.sentences.append(Sentence(event.at, text, what, item.number, causes))
        if loop:
            self.loops.add(item.number)
        return item.number

    def finish(self) -> list[Sentence]:
        """The sentences, with long runs of failed tries cut short in the middle."""
        found: list[Sentence] = []
        run: list[Sentence] = []
        for sentence in [*self.sentences, None]:
            if sentence is not None and sentence.event in self.loops:
                run.append(sentence)
                continue
            found += _shortened(run)
            run = []
            if sentence is not None:
                found.append(sentence)
        return found


def _shortened(run: list[Sentence]) -> list[Sentence]:
    if len(run) <= _LOOP_MAX:
        return run
    dropped = run[2:-2]
    failed = sum(item.what == "agent.failed" for item in dropped)
    middle = Sentence(
        dropped[-1].at,
        f"… and so on, {_count(failed, 'more failed try')}.".replace("trys", "tries"),
        "agent.failed",
        dropped[-1].event,
        (dropped[0].event,) if dropped[0].event is not None else (),
    )
    return [*run[:2], middle, *run[-2:]]


# ---- an agent -----------------------------------------------------------------------------


class _AgentTeller:
    """Follows one agent through the events."""

    def __init__(self, id: str, deployment: str, around: _Around) -> None:
        self._id = id
        self._deployment = deployment
        self._around = around
        self._here: str | None = None
        self._why: list[int] = []
        """What its next placement will be the consequence of."""
        self._since = ""
        """When it began to wait."""
        self._placed: int | None = None
        self.draft = _Draft()
        self.failed: Numbered | None = None
        self.reasons: Mapping[str, str] = {}

    def run(self) -> None:
        given: dict[int, Numbered] = {}
        for item in self._around.events:
            epoch = _mapping(item.event.data.get("epochs")).get(self._id)
            if epoch is not None:
                given[epoch] = item
        for item in self._around.events:
            data = item.event.data
            if data.get("agent") == self._id and data.get("epoch") in given:
                # A node may be quicker to tell of a start than the leader of the assignment.
                self._take(given[data["epoch"]])
            self._take(item)

    def _is_named(self, data: Mapping[str, Any]) -> bool:
        return data.get("agent") == self._id or self._id in _mapping(data.get("agents"))

    def _take(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        if item.number in self.draft.told:
            return
        match event.topic, event.what:
            case "agent", "assigned" | "failed_over" if self._is_named(data):
                self._assigned(item)
            case "agent", "moved" if self._is_named(data):
                self._moved(item)
            case "agent", "started" if self._is_named(data):
                self._started(item)
            case "agent", what if self._is_named(data):
                self._other(item, what)
            case "node", "down" | "left" if data.get("node") == self._here is not None:
                self._lost(item)
            case "worker", "died" if data.get("node") == self._here is not None:
                self._worker_died(item)
            case "deployment", _:
                self._wished(item)
            case "cluster", "storm" if self._here in _names(data.get("nodes")):
                text = f"Many nodes seemed down at once, so failover waited ({event.message})"
                self._why.append(self.draft.add(item, text, self._why))

    def _wished(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        name = self._deployment
        match event.what:
            case "applied" if name in _names(data.get("names")):
                self._why = [self.draft.add(item, f"{name} was applied by {event.source}.")]
                self._since = event.at
            case "scaled" if data.get("name") == name:
                ordinal = self._id.removeprefix(f"{name}-")
                before, after = data.get("before") or 0, data.get("after") or 0
                if ordinal.isdigit() and (int(ordinal) < before) != (int(ordinal) < after):
                    text = f"{name} was scaled from {before} to {after} replicas"
                    why = f" ({_clause(data['why'])})" if data.get("why") else ""
                    self._why = [self.draft.add(item, f"{text}{why}.")]
                    self._since = event.at
            case "rolled_back" | "stuck" | "deleted" if data.get("name") == name:
                self._why = [self.draft.add(item, event.message, self._why)]
                self._since = event.at

    def _lost(self, item: Numbered) -> None:
        event, node = item.event, self._here
        because: list[int] = []
        if event.what == "left":
            text = f"{node}, where it was, left the cluster."
        else:
            text = f"{node}, where it was, went down ({_cause(str(event.data.get('cause')))})."
            elected = self._around.leader_lost(item)
            if elected is not None:
                leader = elected.event.data.get("node")
                because.append(
                    self.draft.add(
                        elected,
                        f"{leader} became leader (term {elected.event.data.get('term')}) "
                        f"instead of {node}.",
                    )
                )
        waits = self._why if self.failed is not None else ()
        self._why = [*waits, *because, self.draft.add(item, text, because)]
        self._since = event.at

    def _worker_died(self, item: Numbered) -> None:
        data = item.event.data
        lost = _names(data.get("lost"))
        is_mine = data.get("suspect") == self._id or self._id in lost
        if not is_mine:
            if int(data.get("agents") or 0) <= len(lost):
                return
            # More agents than are named: it was in this worker if it says so when it starts.
            started = self._around.next_start(self._id, item.number)
            origin = None if started is None else _mapping(started.event.data.get("recovered_from"))
            if not origin or origin.get("reason") != "worker_died":
                return
        text = f"Its worker {data.get('worker')} ended ({_clause(data.get('cause'))})"
        by_itself = data.get("suspect") == self._id
        if by_itself:
            text += " while this very agent was being handled"
        elif data.get("suspect"):
            text += f" while {data['suspect']} was handling a signal"
        self._why = [self.draft.add(item, f"{text}.", loop=by_itself)]
        self._since = item.event.at

    def _assigned(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        node = str(_mapping(data.get("agents")).get(self._id) or "?")
        causes = _mapping(data.get("causes"))
        cause = str(
            _mapping(data.get("why")).get(self._id)
            or (next(iter(causes)) if len(causes) == 1 else "")
        )
        lost = data.get("node") or self._here
        joined = None
        if cause == "waited":
            joined = self._around.last(
                node, ("joined", "returned", "uncordoned"), self._since, event.at
            )
        elif cause == "returned":
            joined = self._around.last(node, ("joined", "returned"), self._since, event.at)
        because = list(self._why)
        if joined is not None:
            because.append(self.draft.add(joined, joined.event.message))
        words = {
            "new": "it had not run before",
            "waited": f"{node} qualifies now"
            if joined
            else "it was waiting, and there was a place",
            "node_down": f"{lost or 'its node'} is down",
            "node_restarted": f"{lost or 'its node'} began a new life, and what ran there is lost",
            "returned": f"its node {node} is back",
            "retry": "its rest after the failed start was over",
            "late": "it was starting for too long",
            "restarted": "it had been stopped to be started again",
        }
        took = f", {data['ms']:g} ms after that was known" if data.get("ms") is not None else ""
        text = f"It was placed on {node}{_chosen_by(data, node)}"
        if cause in words:
            text += f", because {words[cause]}{took}"
        self._placed = self.draft.add(item, f"{text}.", because, loop=cause == "retry")
        self._why = [self._placed]
        self._here = node
        self.reasons = {}

    def _moved(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        node = str(_mapping(data.get("agents")).get(self._id) or "?")
        if node == self._here:
            return  # it has said so itself when it started there
        text = f"It was moved to {node}"
        if self._here is not None:
            text = f"It was moved from {self._here} to {node}"
        self._placed = self.draft.add(item, f"{text}.", [*self._why, *self._emptied(event.at)])
        self._why = [self._placed]
        self._here = node

    def _emptied(self, until: str, node: str | None = None) -> list[int]:
        """The draining of its node, told before what comes of it."""
        found = self._around.last(
            node or self._here or "", ("draining", "cordoned"), self._since, until
        )
        if found is None or (found.event.what == "cordoned" and not found.event.data.get("drain")):
            return []
        return [self.draft.add(found, found.event.message)]

    def _started(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        node = str(data.get("node"))
        origin = _mapping(data.get("recovered_from"))
        because = list(self._why)
        text = f"It started on {node}, epoch {data.get('epoch')}"
        match origin.get("reason"):
            case "moved":
                if node != self._here:
                    because += self._emptied(event.at, str(origin.get("node")))
                text += f", moved from {origin.get('node')}"
            case "node_down":
                text += f", going on where {origin.get('node')} had left off"
            case "worker_died":
                text += ", in a new worker process"
            case "reloaded":
                text += ", with new code, going on from its stored state"
            case "restarted":
                text += ", going on from its stored state"
        self._why = [self.draft.add(item, f"{text}.", because)]
        self._here, self._since = node, event.at
        self.reasons, self.failed = {}, None

    def _other(self, item: Numbered, what: str) -> None:
        event, data = item.event, item.event.data
        node, loop = data.get("node"), False
        match what:
            case "blocked_loop":
                # It changes nothing about where the agent is; it may be why it is slow.
                self.draft.add(item, event.message, loop=True)
                return
            case "failed":
                failures = int(data.get("failures") or 1)
                text = f"It failed on {node}: {_clause(data.get('reason'))}"
                text += f" (failure {failures} in a row" if failures > 1 else " (its first failure"
                if data.get("retry_s") is not None:
                    text += f"; to be tried again after {_seconds(float(data['retry_s']))}"
                text, loop, self.failed = f"{text}).", True, item
            case "stopped":
                text = f"It stopped on {node}: {_clause(data.get('reason'))}."
            case "drained":
                text = f"It was stopped on {node}: {_clause(data.get('reason'))}."
            case "pending":
                self.reasons = {str(k): str(v) for k, v in _mapping(data.get("reasons")).items()}
                text = f"It was pending: {_clause(data.get('reason'))}."
            case "unavailable":
                text = f"It was unavailable: {_clause(data.get('reason'))}."
            case "stopped_by_loss":
                text = f"It was stopped: {_clause(data.get('reason'))}."
            case "quarantined":
                text = f"It is not tried again by itself, after {data.get('failures')} failures."
            case _:
                text = event.message
        self._why = [self.draft.add(item, text, self._why, loop=loop)]
        if not self._since or what != "pending":
            self._since = event.at


def _agent(
    name: str,
    record: AgentRecord | None,
    events: Sequence[Numbered],
    status: DeploymentStatus | None,
    nodes: Mapping[str, NodeNow],
    now: datetime,
) -> Story | None:
    deployment = name
    if record is not None and record.deployment is not None:
        deployment = record.deployment
    elif status is not None:
        deployment = status.name
    teller = _AgentTeller(name, deployment, _Around(events))
    teller.run()
    sentences = teller.draft.finish()
    is_told = any(item.what.startswith("agent.") for item in sentences)
    if record is None and status is None and not is_told:
        return None
    word, text, nexts = _agent_now(name, record, status, nodes, teller, now)
    last = sentences[-1].event if sentences else None
    present = Sentence(now.isoformat(), text, "now", None, () if last is None else (last,))
    reasons = teller.reasons if word == AgentStatus.PENDING else {}
    return Story(Kind.AGENT, name, word, (*sentences, present), tuple(nexts), reasons)


def _agent_now(
    name: str,
    record: AgentRecord | None,
    status: DeploymentStatus | None,
    nodes: Mapping[str, NodeNow],
    teller: _AgentTeller,
    now: datetime,
) -> tuple[str, str, list[str]]:
    if record is None:
        if status is None:
            return (
                "absent",
                f"Nobody wants {name} now, and it runs nowhere.",
                ["Deploy it: its stored state and mailbox are kept."],
            )
        return (
            AgentStatus.PENDING,
            f"{name} is wanted and not placed yet.",
            ["The leader places it; is there one? See `foundation leader`."],
        )
    node = record.node
    if record.move is not None:
        to = record.move.to or "another node"
        return (
            record.status,
            f"It is on its way from {node} to {to}.",
            [f"It starts on {to} once {node} has let it go."],
        )
    match record.status:
        case AgentStatus.RUNNING:
            return (
                record.status,
                f"It runs on {node}, epoch {record.epoch}.",
                _node_doubt(node, nodes),
            )
        case AgentStatus.STARTING | AgentStatus.MOVING:
            return (
                record.status,
                f"It is starting on {node}, epoch {record.epoch}.",
                [
                    f"It runs when {node} says so; if that takes too long, it is placed anew.",
                    *_node_doubt(node, nodes),
                ],
            )
        case AgentStatus.PENDING:
            return (
                record.status,
                f"It is pending: {_clause(record.reason)}.",
                [
                    f"It starts as soon as a node is up that {_needs(record)}.",
                    *_openings(teller.reasons, nodes),
                ],
            )
        case AgentStatus.FAILED:
            return record.status, *_failed_now(name, record, teller.failed, now)
        case AgentStatus.UNAVAILABLE:
            return (
                record.status,
                f"It is unavailable: {_clause(record.reason)}.",
                [f"It starts again when {node} is back."],
            )
        case AgentStatus.STOPPED:
            again = record.spec.restart == "permanent" and "on_node_loss" not in (
                record.reason or ""
            )
            return (
                record.status,
                f"It is stopped: {_clause(record.reason)}.",
                [
                    "It is started again by itself."
                    if again
                    else "Deploy it anew to start it again."
                ],
            )
    return record.status, f"It is {record.status}.", []


def _node_doubt(node: str | None, nodes: Mapping[str, NodeNow]) -> list[str]:
    known = nodes.get(node or "")
    if known is None or known.status not in ("down", "suspect"):
        return []
    return [f"{node} is {known.status}: once the leader is sure, what becomes of it is decided."]


def _openings(reasons: Mapping[str, str], nodes: Mapping[str, NodeNow]) -> list[str]:
    """What could be done at nodes that are there, or were."""
    found = []
    for node, reason in sorted(reasons.items()):
        known = nodes.get(node)
        if known is not None and known.cordon is not None:
            found.append(f"{node} is cordoned: `foundation uncordon {node}`.")
        elif "is down" in reason:
            found.append(f"{node} is down: it counts again once it is back.")
        elif "left" in reason or "full" in reason:
            found.append(f"{node} has no room ({_clause(reason)}): room there would do.")
    return found[:_NAMED_MAX]


def _failed_now(
    name: str, record: AgentRecord, failed: Numbered | None, now: datetime
) -> tuple[str, list[str]]:
    reason = _clause(record.reason)
    if reason.startswith(_QUARANTINED):
        return f"It is in quarantine: {reason}.", [
            f"It is tried again after `foundation agent {name} --release`, or with a changed spec."
        ]
    text = f"It failed {_count(record.failures, 'time')} in a row, last: {reason}."
    if record.spec.restart == "temporary":
        return text, ["It is not tried again (restart: temporary); deploy it anew."]
    if failed is None or failed.event.data.get("retry_s") is None:
        return text, ["It is tried again after a rest that doubles with each failure."]
    rest = float(failed.event.data["retry_s"])
    left = rest - max(0.0, _apart(failed.event.at, now.isoformat()))
    when = f"in {_seconds(left)}" if left > 0 else "now"
    return text, [
        f"The next try is due {when}; the rest after a failure is {_seconds(rest)} by now and grows.",
        f"`foundation agent {name} --release` tries at once.",
    ]


# ---- a deployment ---------------------------------------------------------------------------


class _DeploymentTeller:
    """Follows the agents of one deployment through the events, many at a time."""

    def __init__(self, name: str, records: Sequence[AgentRecord], around: _Around) -> None:
        self._name = name
        self._ids = {record.id for record in records}
        self._like = re.compile(re.escape(name) + r"(-\d+)?\Z")
        self._around = around
        self._where: dict[str, str] = {}
        self._why: list[int] = []
        self._starts: list[tuple[Numbered, str, str]] = []
        self._pauses: set[int] = set()
        self.draft = _Draft()

    def _is_mine(self, agent: object) -> bool:
        return isinstance(agent, str) and (agent in self._ids or bool(self._like.match(agent)))

    def run(self) -> None:
        for item in self._around.events:
            event, data = item.event, item.event.data
            if event.topic == "agent" and event.what == "started":
                if self._is_mine(data.get("agent")):
                    self._starts.append((item, str(data["agent"]), str(data.get("node"))))
                    self._where[str(data["agent"])] = str(data.get("node"))
                continue
            if self._is_about(item):
                self._end_starts()
                self._take(item)
        self._end_starts()

    def _end_starts(self) -> None:
        if not self._starts:
            return
        item = self._starts[-1][0]
        agents = list(dict.fromkeys(agent for _, agent, _ in self._starts))
        where = sorted({node for _, _, node in self._starts})
        text = f"{_list(agents)} started on {_list(where)}."
        self._why = [self.draft.add(item, text, self._why)]
        self._starts = []

    def _is_about(self, item: Numbered) -> bool:
        event, data = item.event, item.event.data
        match event.topic:
            case "deployment":
                return data.get("name") == self._name or self._name in _names(data.get("names"))
            case "agent":
                agents = [data.get("agent"), *_mapping(data.get("agents"))]
                return any(map(self._is_mine, agents))
            case "node":
                told = event.what in ("down", "left", "draining")
                return told and data.get("node") in self._where.values()
            case "worker":
                agents = [data.get("suspect"), *_names(data.get("lost"))]
                return any(map(self._is_mine, agents))
        return False

    def _take(self, item: Numbered) -> None:
        event, data = item.event, item.event.data
        match event.topic, event.what:
            case "deployment", "applied":
                self._why = [self.draft.add(item, f"{self._name} was applied by {event.source}.")]
            case "deployment", _:
                why = f" ({_clause(data['why'])})" if data.get("why") else ""
                self._why = [self.draft.add(item, event.message.rstrip(".") + f"{why}.")]
            case "node", _:
                node = data.get("node")
                lost = [agent for agent, here in self._where.items() if here == node]
                word = {"left": "left, with", "down": "went down, with"}.get(
                    event.what, "hands over"
                )
                text = f"{node} {word} {_list(lost)}."
                self._why = [self.draft.add(item, text)]
            case "worker", _:
                self._why = [self.draft.add(item, event.message)]
            case "agent", "assigned" | "failed_over" | "moved":
                placed = {
                    agent: str(node)
                    for agent, node in _mapping(data.get("agents")).items()
                    if self._is_mine(agent)
                }
                if event.what == "moved" and all(
                    self._where.get(agent) == node for agent, node in placed.items()
                ):
                    return
                self._where |= placed
                word = "moved to" if event.what == "moved" else "placed on"
                cause = {
                    "failed_over": f" because {data.get('node')} is down",
                }.get(event.what, "")
                causes = {_mapping(data.get("why")).get(agent) for agent in placed}
                if causes == {"retry"}:
                    cause = ", once more after a failure"
                text = f"{_list(placed)} {'was' if len(placed) == 1 else 'were'} {word} "
                text += f"{_list(sorted(set(placed.values())))}{cause}."
                self._why = [self.draft.add(item, text, self._why, loop=causes == {"retry"})]
            case "agent", "failed":
                text = f"{data.get('agent')} failed on {data.get('node')}: "
                text += f"{_clause(data.get('reason'))} ({_count(data.get('failures') or 1, 'failure')})."
                self._why = [self.draft.add(item, text, self._why, loop=True)]
            case "agent", "pending" | "unavailable" | "stopped_by_loss":
                mine = [a for a in _mapping(data.get("agents")) if self._is_mine(a)]
                word = "stopped" if event.what == "stopped_by_loss" else event.what
                text = f"{_list(mine)} {'was' if len(mine) == 1 else 'were'} {word}: "
                self._why = [
                    self.draft.add(item, f"{text}{_clause(data.get('reason'))}.", self._why)
                ]
            case _:
                self._why = [self.draft.add(item, event.message, self._why)]


def _deployment(
    name: str,
    records: Sequence[AgentRecord],
    events: Sequence[Numbered],
    status: DeploymentStatus | None,
    nodes: Mapping[str, NodeNow],
    now: datetime,
) -> Story | None:
    around = _Around(events)
    teller = _DeploymentTeller(name, records, around)
    teller.run()
    sentences = teller.draft.finish()
    if status is None and not any(item.what.startswith("deployment.") for item in sentences):
        return None
    nexts: list[str] = []
    if status is None:
        word, text = "absent", f"Nobody wants {name} now."
    else:
        parts = [
            f"{number} {what}"
            for what, number in (
                ("pending", status.pending),
                ("failed", status.failed),
                ("otherwise", status.other),
            )
            if number
        ]
        word = "settled" if status.settled else "unsettled"
        text = f"{status.running} of {_count(status.desired, 'agent')} run"
        text += f"; {', '.join(parts)}." if parts else ", as wished." if status.settled else "."
        nexts = _deployment_next(records, status, around, nodes, now)
    last = sentences[-1].event if sentences else None
    present = Sentence(now.isoformat(), text, "now", None, () if last is None else (last,))
    reasons = {} if status is None else dict(status.reasons)
    return Story(Kind.DEPLOYMENT, name, word, (*sentences, present), tuple(nexts), reasons)


def _deployment_next(
    records: Sequence[AgentRecord],
    status: DeploymentStatus,
    around: _Around,
    nodes: Mapping[str, NodeNow],
    now: datetime,
) -> list[str]:
    by_id = {record.id: record for record in records}
    nexts: list[str] = []
    told: set[str] = set()
    for agent in status.reasons:
        teller = _AgentTeller(agent, status.name, around)
        teller.run()
        _, _, more = _agent_now(agent, by_id.get(agent), status, nodes, teller, now)
        for text in more:
            if text not in told:
                told.add(text)
                nexts.append(f"{agent}: {text}")
        if len(told) >= _AGENTS_NEXT_MAX:
            break
    return nexts


# ---- a node -----------------------------------------------------------------------------------


def _node(
    name: str,
    records: Sequence[AgentRecord],
    events: Sequence[Numbered],
    nodes: Mapping[str, NodeNow],
    now: datetime,
) -> Story | None:
    draft = _Draft()
    why: list[int] = []
    last_word = ""
    arrived: list[tuple[Numbered, int]] = []

    def end_arrivals() -> None:
        if arrived:
            count = sum(number for _, number in arrived)
            draft.add(arrived[-1][0], f"It was given {_count(count, 'agent')}.")
            arrived.clear()

    for item in events:
        event, data = item.event, item.event.data
        match event.topic, event.what:
            case "agent", "assigned" | "failed_over" | "moved" if name in _mapping(data.get("to")):
                arrived.append((item, int(data["to"][name])))
                continue
            case "node", _ if data.get("node") == name:
                end_arrivals()
                cause = "" if event.what != "down" else f" ({_cause(str(data.get('cause')))})"
                text = f"Node {name} went down{cause}." if cause else event.message
                why = [draft.add(item, text, why if event.what in ("down", "left") else ())]
                last_word = event.what
            case "leader", _ if data.get("node") == name:
                end_arrivals()
                draft.add(item, event.message)
            case "worker", "died" if data.get("node") == name:
                end_arrivals()
                draft.add(item, event.message)
            case "agent", "failed_over" if data.get("node") == name:
                end_arrivals()
                took = f", {data['ms']:g} ms after that was known" if data.get("ms") else ""
                draft.add(item, event.message.rstrip(".") + f"{took}.", why)
            case "agent", "moved" if name in _names(data.get("sources")):
                end_arrivals()
                if last_word != "left":  # else it is told once more, by the next leader
                    draft.add(item, event.message, why)
            case "agent", "unavailable" | "stopped_by_loss" if f"node {name} " in str(
                data.get("reason")
            ):
                end_arrivals()
                draft.add(item, event.message, why)
            case "cluster", "storm" if name in _names(data.get("nodes")):
                end_arrivals()
                why.append(draft.add(item, event.message, why))
    end_arrivals()
    known = nodes.get(name)
    sentences = draft.finish()
    if known is None and not any(item.what.startswith("node.") for item in sentences):
        return None
    if known is not None and known.status == "down" and last_word == "left":
        known = None  # what is left of it is the note that this life is over
    word, text, nexts = _node_now(name, known, records)
    last = sentences[-1].event if sentences else None
    present = Sentence(now.isoformat(), text, "now", None, () if last is None else (last,))
    return Story(Kind.NODE, name, word, (*sentences, present), tuple(nexts))


def _node_now(
    name: str, known: NodeNow | None, records: Sequence[AgentRecord]
) -> tuple[str, str, list[str]]:
    held = [record for record in records if record.node == name]
    waiting = sum(record.status is AgentStatus.UNAVAILABLE for record in held)
    again = f"`foundation node start --name {name}` brings it back."
    if known is None:
        return "absent", f"{name} is not in the cluster now.", [again]
    waits = f", and {_count(waiting, 'agent')} waits for its return" if waiting else ""
    match known.status:
        case "down":
            return (
                "down",
                f"{name} is down{waits}.",
                [
                    again,
                    "Its agents run elsewhere, or do as their `on_node_loss` says.",
                ],
            )
        case "suspect":
            return (
                "suspect",
                f"{name} does not answer at the moment.",
                ["It is up again when it is heard, and down when it stays silent."],
            )
        case "draining":
            return "draining", f"{name} hands over its agents; {known.agents} are left.", []
    leads = " and leads" if known.is_leader else ""
    text = f"{name} is {known.status}{leads}, with {_count(known.agents, 'agent')}."
    if known.cordon is not None:
        return (
            known.status,
            f"{text[:-1]}; it gets no new ones ({known.cordon or 'cordoned'}).",
            [f"`foundation uncordon {name}` lets it get agents again."],
        )
    if known.short_lives is not None:
        return (
            known.status,
            f"{text[:-1]}; it gets more only if no other node can take them, because its last "
            f"{known.short_lives} lives were short.",
            ["It is trusted again once it has lived for `control.stable_after_s`."],
        )
    return known.status, text, []


__all__ = ["Kind", "NodeNow", "Numbered", "Sentence", "Story", "tell"]
