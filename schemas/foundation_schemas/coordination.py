"""What the keys of locks, elections, semaphores, counters and of all the patterns hold.

Pure. Keys of locks, elections, semaphores and barriers are never deleted, so that tokens and
generations only grow; votes, auctions and sagas go some days after they have ended.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from foundation_schemas.base import Name, WireModel


class LockRecord(WireModel):
    """Who holds a lock; the key is never deleted, so that tokens only grow."""

    holder: str | None = None
    """Unique per acquisition; None: released."""
    owner: str = ""
    """Who that is, for people."""
    token: int = 0
    ttl_s: float = 10.0
    """Without a renewal for this long others may take it."""
    since: str = ""
    """When it was acquired, for people."""


class ElectionRecord(WireModel):
    """Who leads, in which term; the term is the fencing token."""

    leader: str | None = None
    """None: nobody; the last one has resigned."""
    incarnation: int = 0
    """Tells two candidacies of the same name apart."""
    term: int = 0
    ttl_s: float = 15.0
    """Without a renewal for this long others may take over."""
    value: str = ""
    """What the leader wants others to know, such as its address."""
    since: str = ""
    """When it was elected, for people."""


class PermitRecord(WireModel):
    """One permit of a semaphore that is held."""

    holder: str
    """Unique per acquisition."""
    owner: str = ""
    token: int
    ttl_s: float
    beat: int = 0
    """Raised at every renewal: where it stands still for `ttl_s` the holder is gone."""
    since: str = ""


class SemaphoreRecord(WireModel):
    """Who holds the permits of a semaphore."""

    permits: int
    holders: list[PermitRecord] = Field(default_factory=list)
    token: int = 0
    """The highest fencing token given so far."""


class CounterRecord(WireModel):
    """One writer's part of a counter; both sums only grow."""

    plus: int = 0
    minus: int = 0
    sequence: int = 0
    """The number of the writer's last increment: a repeat of it counts once."""


class BarrierRecord(WireModel):
    """Who has arrived at a barrier's present generation, and which of the earlier ones broke."""

    parties: int
    names: list[str] | None = None
    """Who they are, where that is known."""
    generation: int = 1
    arrived: dict[str, str] = Field(default_factory=dict)
    """Party to the arrival, which is unique."""
    deadline: float | None = None
    """When the generation breaks, in seconds of the server's clock; None while nobody waits."""
    last: list[str] = Field(default_factory=list)
    """The arrivals of the latest generation that is over."""
    gone: list[str] = Field(default_factory=list)
    """Arrivals of this generation that were taken back: nobody who has heard of them counts them."""
    broken: dict[int, list[str]] = Field(default_factory=dict)
    """The latest broken generations, to who was missing; those not named have ended well."""
    forgotten: int = 0
    """The latest broken generation that is not kept any more."""


class Ballot(WireModel):
    """What one voter has said, or why it said nothing."""

    choice: str | None = None
    """None: an abstention."""
    reason: str = ""
    """The voter's own words."""
    unavailable: str = ""
    """Why it could not be asked, or gave no valid answer; then it has not voted."""


class VoteResult(WireModel):
    """How a vote ended."""

    choice: str | None = None
    """None: no choice has reached the quorum."""
    reason: str = ""
    counts: dict[str, float] = Field(default_factory=dict)
    """Weight per choice, by the time it was decided."""
    abstained: list[str] = Field(default_factory=list)
    unavailable: dict[str, str] = Field(default_factory=dict)
    """Voter to why it could not vote."""
    missing: list[str] = Field(default_factory=list)
    """Who had not voted when it was decided."""
    at: str = ""


class VoteRecord(WireModel):
    """One vote: the question, who may vote, the ballots, the result."""

    question: Any = None
    choices: list[str]
    voters: dict[str, float]
    """To the weight."""
    asked: list[str] = Field(default_factory=list)
    """Those of them that are agents and are asked; the others cast by themselves."""
    quorum: str
    """``majority``, ``all``, or a weight."""
    opened: float
    deadline: float
    """Both in seconds of the server's clock."""
    ballots: dict[str, Ballot] = Field(default_factory=dict)
    result: VoteResult | None = None
    delivered: bool = False
    """The result was sent to the voters that are agents, and to the topic."""
    untold: dict[str, str] = Field(default_factory=dict)
    """To whom it could not be sent, and why; it is tried again whenever somebody asks for the result."""


class Bid(WireModel):
    """What one bidder has answered to the announcement."""

    value: Any = None
    """What it offers; None: it does not bid."""
    refused: str = ""
    """Why it does not bid, or could not be asked."""


class AuctionResult(WireModel):
    """Who gets the task."""

    winner: str | None = None
    """None: nobody has bid and accepted."""
    bid: Any = None
    ranking: list[str] = Field(default_factory=list)
    """Those that have bid, the best first."""
    refused: dict[str, str] = Field(default_factory=dict)
    """Who did not bid, or did not accept, and why."""
    at: str = ""


class AuctionRecord(WireModel):
    """One auction: the task, the bids, whose turn it is to accept, the award."""

    task: Any = None
    bidders: list[str]
    opened: float
    deadline: float
    """For bids; both in seconds of the server's clock."""
    bids: dict[str, Bid] = Field(default_factory=dict)
    ranking: list[str] | None = None
    """Set once, when the bids are closed."""
    turn: int = 0
    """Which of the ranking is offered the award."""
    offered: float = 0.0
    """Since when, by the server's clock."""
    declined: dict[str, str] = Field(default_factory=dict)
    result: AuctionResult | None = None
    delivered: bool = False
    """The award was sent to the winner."""


class SagaStep(WireModel):
    """One step of a saga: a question to an agent, and how to make it undone."""

    name: Name
    agent: str
    type: str
    data: Any = None
    undo: str | None = None
    """The type of the signal that makes it undone: ``{"saga", "step", "data", "result"}``.
    None: it stays."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Without an answer by then the saga turns round."""


class SagaState(StrEnum):
    """Where a saga is."""

    RUNNING = "running"
    UNDOING = "undoing"
    DONE = "done"
    UNDONE = "undone"
    STUCK = "stuck"
    """A compensation has failed; it is tried again when the saga is called again."""


class StepState(StrEnum):
    """Where one step of a saga is."""

    WAITING = "waiting"
    ASKED = "asked"
    DONE = "done"
    FAILED = "failed"
    """The agent's handler has refused or raised: nothing to undo."""
    UNKNOWN = "unknown"
    """No answer in time: it is undone, as if it was done."""
    UNDOING = "undoing"
    UNDONE = "undone"
    KEPT = "kept"
    """It has no `undo`."""


class StepProgress(WireModel):
    """How far one step has come."""

    state: StepState = StepState.WAITING
    asked: float = 0.0
    """When it (or its undoing) may have been asked first, by the server's clock."""
    result: Any = None
    error: str = ""
    undo_tries: int = 0


class SagaRecord(WireModel):
    """One saga: its steps, and how far each is."""

    steps: list[SagaStep]
    progress: list[StepProgress]
    state: SagaState = SagaState.RUNNING
    error: str = ""
    """Why it turned round, or is stuck."""
    started: str = ""
    ended: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in (SagaState.DONE, SagaState.UNDONE)

    def results(self) -> dict[str, Any]:
        """Step to what its agent has answered."""
        pairs = zip(self.steps, self.progress, strict=True)
        return {step.name: part.result for step, part in pairs if part.state is StepState.DONE}


class QueueItem(WireModel):
    """One item of a work queue."""

    id: str
    key: str | None = None
    data: Any = None
    at: str = ""


class DeadItem(WireModel):
    """An item of a work queue that was given up."""

    item: QueueItem
    sequence: int
    """Its place in the queue; what `replay` wants."""
    attempts: int
    reason: str
    at: str


class Span(WireModel):
    """Consecutive items of an input that have been taken in, and may have been asked about."""

    first: int
    """The number of the first; of the whole input, from 0."""
    count: int
    opened: float
    """By the server's clock: nothing of it was asked before."""
    digest: str
    """Of the items, so that another input under the same id is noticed."""
    lost: dict[int, list[str]] = Field(default_factory=dict)
    """Items that were given up without an answer, to the stage and the reason."""
    finished: bool = False
    """The outcome of each item stands."""
    agents: dict[str, list[str]] = Field(default_factory=dict)
    """Of a pipeline: who does the stages that name agents by what they are."""


class PipelineStage(WireModel):
    """One stage of a pipeline: which agents do it, and how often and how long it is tried."""

    name: Name
    agents: list[str]
    """Ids, ``capability:NAME``, ``any:NAME`` or ``deployment:NAME``. Item number n goes to the agent
    n modulo their number."""
    type: str
    timeout_s: float = Field(default=60.0, gt=0)
    """Without an answer by then the item has failed, or is asked again: `on_timeout`."""
    retries: int = Field(default=0, ge=0, le=100)
    """How often an item that was refused (its handler raised) is asked anew."""
    backoff_s: float = Field(default=0.0, ge=0, le=60)
    """Before an item is asked anew; twice as long each time, up to a minute."""
    on_timeout: Literal["fail", "retry"] = "fail"
    """``retry``: an answer that does not come in time is an attempt, of which there are `retries` more."""


class PipelineRecord(WireModel):
    """One run of a pipeline: its stages, what was taken in, and what was handed out."""

    stages: list[PipelineStage]
    cursor: int = 0
    """So many items are over and their results were handed out."""
    failed: int = 0
    """How many of those have failed."""
    spans: list[Span] = Field(default_factory=list)
    """What has been taken in since, in order."""
    total: int | None = None
    """How many items the input has, once its end was seen."""
    started: str = ""
    ended: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.total is not None and self.cursor >= self.total


class MapRecord(WireModel):
    """One map-reduce job: what was taken in, which chunks are counted, and what they make together."""

    mapper: str
    """The capability that those who map have."""
    type: str
    fold: str
    """How chunks are put together: a name, or ``agent:ID``; ``function`` if it is the caller's."""
    combine: str = ""
    """How, and how many of them, before the reducer gets them; empty: they are not."""
    initial: Any = None
    cursor: int = 0
    """So many chunks are counted, each once, in their order."""
    items: int = 0
    """In those chunks."""
    value: Any = None
    """What they make together."""
    spans: list[Span] = Field(default_factory=list)
    """The chunks that have been taken in since, in order."""
    total: int | None = None
    """How many items the input has, once its end was seen."""
    error: str = ""
    """Why a chunk could not be done; it is tried anew when the job is called again."""
    rounds: int = 0
    """How often that was so."""
    started: str = ""
    ended: str = ""

    @property
    def is_over(self) -> bool:
        """Whether every chunk is counted."""
        return self.total is not None and self.items >= self.total
