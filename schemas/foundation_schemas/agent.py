"""What to run (`AgentSpec`), where it runs under which epoch (`AgentRecord`), and what it has become (`StateRecord`).

Pure. The `AgentRecord` in the ``agents`` bucket is the truth about placement:
an assignment *is* a record that names a node, and that node acts on it. The
`StateRecord` in the ``state`` bucket is the truth about effects: state, cursor
and outbox are one value, so they change together or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, Field, field_validator, model_validator

from foundation_schemas.base import AgentId, Capability, Name, NodeId, WireModel
from foundation_schemas.label import parse_expression
from foundation_schemas.signal import check_topic_pattern


class AgentStatus(StrEnum):
    """The words for an agent's condition; part of the contract."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    MOVING = "moving"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    STOPPED = "stopped"
    HIBERNATED = "hibernated"


class OnNodeLoss(StrEnum):
    """What becomes of an agent whose node is down."""

    RESTART = "restart"
    UNAVAILABLE = "unavailable"
    STOP = "stop"


class NodeLoss(WireModel):
    """`OnNodeLoss`, and for how long the agent waits for its node before that."""

    policy: OnNodeLoss
    grace_s: float = Field(gt=0)
    """If the node returns within it, the agent starts there again. After it: `restart` and
    `unavailable` start it elsewhere, `stop` stops it. Without a grace `unavailable` waits for ever."""


def _checked_expression(text: str) -> str:
    parse_expression(text)
    return text


class OnParentDeath(StrEnum):
    """What becomes of a child whose parent has ended for good."""

    STOP = "stop"
    CONTINUE = "continue"
    EMIT_ORPHAN = "emit_orphan"
    """It goes on, and is sent ``foundation.orphaned``."""


class ParentLink(WireModel):
    """Whose child an agent is."""

    id: AgentId
    """The parent."""
    tag: Name
    """What the parent calls it."""
    order: int
    """Which of the parent's orders started it: one tag may be used again."""
    signal: str = ""
    """The id of the signal that carried that order: unlike its number never used again."""
    on_death: OnParentDeath = OnParentDeath.STOP
    local: bool = False
    """It runs where its parent runs."""


class RestartLimit(WireModel):
    """How many restarts are enough to give an agent up."""

    max_restarts: int = Field(default=3, ge=0)
    within_s: float = Field(default=60.0, gt=0)


class RateLimit(WireModel):
    """How fast an agent begins to handle what it is sent; see `foundation_nats.agent.intake`."""

    per_s: float | None = Field(default=None, gt=0)
    """So many signals and asks a second, all senders together; None: no limit."""
    burst: float | None = Field(default=None, ge=1)
    """So many at once, after a rest; as many as a second has, at least 1, unless given."""
    per_sender: float | None = Field(default=None, gt=0)
    """So many a second, and at once, of each source; None: no limit."""

    @model_validator(mode="after")
    def _says_something(self) -> RateLimit:
        if self.per_s is None and self.per_sender is None:
            raise ValueError("say per_s, per_sender or both")
        if self.burst is not None and self.per_s is None:
            raise ValueError("burst belongs to per_s")
        return self


class WhenUnsatisfiable(StrEnum):
    """What becomes of a replica that has no place within the skew."""

    PENDING = "pending"
    ANYWAY = "anyway"


class Spread(WireModel):
    """How evenly replicas lie over the values of a label."""

    label: str = Field(min_length=1)
    max_skew: int = Field(default=1, ge=1)
    """By how many the fullest value may exceed the emptiest that has a node which qualifies."""
    when_unsatisfiable: WhenUnsatisfiable = WhenUnsatisfiable.PENDING
    """`pending`: the skew is never exceeded; `anyway`: as even as can be, and placed."""


class PlacementPolicy(WireModel):
    """Where an agent may and should run."""

    strategy: str = "load_balanced"
    require: list[Capability] = Field(default_factory=list)
    """Capabilities the node must offer."""
    prefer: list[Capability] = Field(default_factory=list)
    """Capabilities that make a node better."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels the node must carry, with these very values."""
    expressions: list[Annotated[str, AfterValidator(_checked_expression)]] = Field(
        default_factory=list
    )
    """What the node's labels must satisfy, all of it: see `foundation_schemas.label`."""
    spread: str | Spread | None = None
    """Over whose values replicas are spread; a plain name is the object with `anyway`."""
    anti_affinity: bool | str = False
    """True: at most one replica of the deployment per node; a label: per value of it."""
    max_per_node: int | None = Field(default=None, ge=1)
    """Replicas of the deployment on one node."""

    @field_validator("anti_affinity")
    @classmethod
    def _check_label(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("the label's name is empty")
        return value

    @property
    def spread_label(self) -> str | None:
        """The label of `spread`."""
        return self.spread.label if isinstance(self.spread, Spread) else self.spread

    @property
    def skew_max(self) -> int | None:
        """The skew that is never exceeded; None: there is no such rule."""
        spread = self.spread
        if isinstance(spread, Spread) and spread.when_unsatisfiable is WhenUnsatisfiable.PENDING:
            return spread.max_skew
        return None


class SubscriptionMode(StrEnum):
    """Which of those that subscribe get a signal on a topic."""

    ALL = "all"
    ONE_OF_GROUP = "one-of-group"


class Subscription(WireModel):
    """What an agent wants to be sent of what is published on topics."""

    topic: Annotated[str, AfterValidator(check_topic_pattern)]
    """A pattern: ``*`` stands for one word, a last ``>`` for one or more."""
    mode: SubscriptionMode = SubscriptionMode.ALL
    group: Name | None = None
    """With `one-of-group`: those of one group share the work; None: those of one deployment."""


_LATER: dict[str, Any] = {"expressions": [], "anti_affinity": False, "max_per_node": None}
"""Keys of placement that 0.1 did not know: absent from the digest while they say nothing, so
that an upgrade restarts no agent."""


class AgentSpec(WireModel):
    """What to run: the same for all replicas of a deployment."""

    run: str
    """``module:Class``."""
    critical: bool = False
    durable: bool = True
    capabilities: list[Capability] = Field(default_factory=list)
    """What the agent provides to callers."""
    resources: dict[str, float] = Field(default_factory=dict)
    """What it needs of its node; ``slots`` is 1 unless said otherwise."""
    placement: PlacementPolicy = PlacementPolicy()
    on_node_loss: OnNodeLoss | NodeLoss | None = None
    """None: `restart` for critical agents, else `unavailable` for a grace and then `restart`."""
    config: dict[str, Any] = Field(default_factory=dict)
    restart: str = "permanent"
    labels: dict[str, str] = Field(default_factory=dict)
    """Its own, for targets of ``label:EXPRESSION``; the nodes' are in `placement`."""
    subscribe: list[Subscription] = Field(default_factory=list)
    """Topics whose signals it is sent."""
    reservation: str | None = None
    """Of resources: where it still counts the agent starts there first, and it becomes its share."""
    restart_limit: RestartLimit | None = None
    """After more restarts within that time it is left alone, as after too many failed starts."""
    rate: RateLimit | None = None
    """How fast it takes in what it is sent; None: as fast as it can."""
    parent: ParentLink | None = None
    """Who started it, and what becomes of it when that one ends."""

    @field_validator("subscribe", mode="before")
    @classmethod
    def _topics(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"topic": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("on_node_loss", mode="before")
    @classmethod
    def _plain_policy(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and set(value) == {"policy"}:
            return value["policy"]
        return value

    @field_validator("run")
    @classmethod
    def _check_run(cls, value: str) -> str:
        module, colon, name = value.partition(":")
        parts = module.split(".") + name.split(".")
        if not colon or not all(part.isidentifier() for part in parts):
            raise ValueError(f"{value!r} is not of the form 'module:Class'")
        return value

    @field_validator("restart")
    @classmethod
    def _check_restart(cls, value: str) -> str:
        if value not in ("permanent", "transient", "temporary"):
            raise ValueError(f"{value!r} is not one of permanent, transient, temporary")
        return value

    def digest(self) -> str:
        """Twelve hex digits that change when the spec does."""
        values = self.model_dump(mode="json")
        placement = values["placement"]
        for key, blank in _LATER.items():
            if placement[key] == blank:
                del placement[key]
        for key in ("reservation", "labels", "subscribe", "restart_limit", "rate", "parent"):
            if not values[key]:
                del values[key]
        raw = orjson.dumps(values, option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(raw, digest_size=6).hexdigest()


class RecoveredFrom(WireModel):
    """Which earlier activation an agent continues; handed to `Agent.on_start`."""

    node: NodeId
    epoch: int
    reason: str
    """``node_down``, ``worker_died``, ``moved``, ``restarted``, ``reloaded``."""
    sequence: int | None = None
    """The signal that was being handled when the worker died; None: another agent's, or none."""
    cause: str | None = None
    """How the worker ended while this agent was being handled."""


class MoveOrder(WireModel):
    """Where a running agent shall go; in its record until the node that runs it has let it go.

    That node stops it in good order and then writes the assignment of the next node
    itself, so that the agent pauses for one hop only. Where it can't, any leader goes on.
    """

    to: NodeId | None = None
    """None: wherever the leader places it."""
    incarnation: int = 0
    """The life of that node."""
    why: str = ""
    """For people: drained, rebalanced."""


class AgentRecord(WireModel):
    """The registry's entry for one agent; every write is a compare-and-set."""

    id: AgentId
    deployment: str | None = None
    status: AgentStatus = AgentStatus.PENDING
    desired: str = "run"
    """``run`` or ``stop``: what the leader wants of the node that holds it."""
    node: NodeId | None = None
    incarnation: int = 0
    """The life of the node it was assigned to."""
    epoch: int = 0
    spec: AgentSpec
    digest: str = ""
    reason: str | None = None
    """Why it is pending, unavailable or failed."""
    recovered_from: RecoveredFrom | None = None
    failures: int = 0
    """Failed starts in a row, for back-off."""
    restarts: list[str] = Field(default_factory=list)
    """When it was restarted lately, UTC; kept only where `restart_limit` asks for it."""
    move: MoveOrder | None = None
    """While it is `moving`: `desired` is ``stop`` then, and it is stopped to run elsewhere."""
    asleep: bool = False
    """While it is `running`: whether it hibernates on its node until the next signal."""
    returns: bool = False
    """Whether it is stopped only to be started anew: mail for many is still its own."""
    since: str | None = None
    """UTC of the last change, for people."""

    @property
    def hibernates(self) -> bool:
        """Whether it sleeps on its node."""
        return self.asleep and self.status is AgentStatus.RUNNING

    @property
    def is_wanted(self) -> bool:
        """Whether it shall run, now or once it was moved or changed."""
        return self.desired == "run" or self.move is not None or self.returns


class OutboxEntry(WireModel):
    """Something to publish once the record that holds it is stored."""

    subject: str
    msg_id: str
    body: Any
    headers: dict[str, str] | None = None
    """Besides the id: what makes it a timer, see `signaling/schedules.py`."""


class Writer(WireModel):
    """Who wrote a state record, so that an unknown outcome can be resolved by reading it."""

    node: str
    incarnation: int
    worker: str


class StepStatus(StrEnum):
    """How far a step of `ctx.once` is known to be."""

    PENDING = "pending"
    """It was begun; done or not, nobody here knows."""
    DONE = "done"


class StepRecord(WireModel):
    """A step outside NATS that must not be repeated: see `agent/steps.py`."""

    cause: str = ""
    """Source and id of the signal it belongs to; empty: the agent itself."""
    key: str
    status: StepStatus
    at: str
    """Since when, UTC."""
    attempts: int = 1
    result: Any = None
    note: str = ""
    """What it raised last, while it is pending."""
    lost: bool = False
    """It is done, and its result was too large to be kept."""


class ChildStatus(StrEnum):
    """A child as its parent knows it."""

    STARTING = "starting"
    """It is wished for; it may be running already."""
    RUNNING = "running"
    STOPPING = "stopping"
    """It shall end, and has not ended yet."""
    WAITING = "waiting"
    """It has ended, and is started again once those that end with it have ended."""


class ChildRecord(WireModel):
    """A child in its parent's record."""

    tag: Name
    id: AgentId
    run: str
    order: int
    status: ChildStatus = ChildStatus.STARTING
    digest: str = ""
    """Of what it was started with."""
    restart: str = "transient"
    wish: dict[str, Any] | None = None
    """What it is started with; kept where the parent itself may start it again."""
    again: bool = False
    """Once it has ended it is started again."""


class FamilyRecord(WireModel):
    """What an agent knows of its children and its parent; part of the unit of commit."""

    orders: int = 0
    """How many orders it has given; they count on for ever."""
    children: list[ChildRecord] = Field(default_factory=list)
    """In the order in which they were started."""
    restarts: list[str] = Field(default_factory=list)
    """When it restarted children by its strategy, UTC."""
    announced: int = 0
    """The order of its parent under which it has said that it runs."""
    orphaned: bool = False
    """It has heard that its parent ended."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to store."""
        return self == FamilyRecord()


class BaseRecord(WireModel):
    """Which state is stored beside a record, for a replay to begin at."""

    place: int
    """0 or 1: the key in the bucket ``state`` is the agent's id, a dot and this."""
    cursor: int
    """The mailbox sequence up to which signals have taken effect in it."""
    handled: int = 0
    """As in `PastRecord`, at that moment."""
    asides: int = 0


class StoredBase(BaseRecord):
    """A state that an agent once had, stored for a replay to begin at."""

    v: int = 1
    epoch: int = 0
    run: str = ""
    schema_version: int = 1
    state: dict[str, Any] = Field(default_factory=dict)


class PastRecord(WireModel):
    """What is known of the handled signals that an agent keeps; see `agent/past.py`."""

    handled: int = 0
    """Signals done with, ever since some are kept."""
    asides: int = 0
    """How often the state was changed by something that is no signal: questions, hooks."""
    void: list[int] = Field(default_factory=list)
    """Those of the kept ones that took no effect."""
    bases: list[BaseRecord] = Field(default_factory=list)
    """The newest last; behind the first of them no handled signal is missing."""


class StateRecord(WireModel):
    """State, cursor and outbox of one agent: the unit of commit."""

    v: int = 1
    epoch: int
    commit: int
    """Counts the commits of this agent for ever."""
    writer: Writer
    cursor: int
    """The mailbox sequence up to which signals have taken effect."""
    mark: str = ""
    """The latest of the times at which the server stored them; see `agent/rewind.py`."""
    run: str
    schema_version: int = 1
    state: dict[str, Any] | None
    salt: str
    """Random, per agent; ids of emitted signals derive from it."""
    emitted: int = 0
    outbox: list[OutboxEntry] = Field(default_factory=list)
    outbox_since: str = ""
    """The server's time of the record that first held this outbox, while it is being recovered."""
    ahead: list[tuple[int, str]] = Field(default_factory=list)
    """Urgent signals beyond the cursor that were handled, each with the time at which it was stored."""
    skip: list[int] = Field(default_factory=list)
    """Signals beyond the cursor that were given to another agent: see `signaling/rerouter.py`."""
    steps: list[StepRecord] = Field(default_factory=list)
    """What was begun and done outside, until its signal has taken effect."""
    sensors: dict[str, Any] = Field(default_factory=dict)
    """How far each sensor has come, by its name."""
    family: FamilyRecord | None = None
    """Its children, as far as it has any; see `agent/family.py`."""
    past: PastRecord | None = None
    """What it keeps of what it has handled, if it keeps any."""
    attempt: list[int] | None = None
    """[sequence, attempts] of a signal whose handling may have killed the worker."""
