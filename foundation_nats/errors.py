"""Every error we raise on purpose, as one tree, each with `code`, `retryable` and `outcome`.

::

    FoundationError
    ├── ConfigError                     settings are wrong; raised before any I/O
    │   └── ManifestError               a manifest is wrong: what, on which line, what would be right
    ├── ServerError                     the nats-server cannot be started or used
    ├── LaunchError                     a node could not be started or removed by its launcher
    ├── BusError                        NATS did not do what we asked
    │   ├── BusUnavailableError         retryable   not applied     no connection, no JetStream leader
    │   │   └── NoRespondersError       nobody listens on the subject
    │   ├── BusTimeoutError             retryable   outcome UNKNOWN
    │   ├── BusRefusedError             not applied     limits, missing stream
    │   │   ├── PermissionDeniedError
    │   │   └── PayloadTooLargeError
    │   └── DecodeError                 bytes that are none of our models
    ├── ConflictError                   someone else was first
    │   ├── AlreadyExistsError
    │   ├── NodeNameTakenError
    │   ├── StaleRevisionError          re-read and decide again
    │   ├── FencedError                 your epoch is over: stop, do not retry
    │   ├── LockLostError               the lock, permit or leadership is not yours any more
    │   ├── NotLeaderError              retryable   somebody else leads the group, or nobody
    │   ├── LockTimeoutError            retryable   somebody else held it all the time
    │   ├── BarrierBrokenError          not everyone came in time; names who is missing
    │   ├── VoteClosedError             decided, or its time is over: the ballot does not count
    │   ├── ReservationLostError        it has expired or was released: what it held is not yours
    │   ├── ProposalRejectedError       the domain's validator said no
    │   └── DomainBusyError             retryable   not applied     others' proposals came first all the time
    ├── NotFoundError
    │   ├── SignalNotFoundError         no signal or timer of that id is known (any more)
    │   ├── AgentNotFoundError
    │   ├── NodeNotFoundError
    │   ├── DeploymentNotFoundError
    │   ├── DeadLetterNotFoundError
    │   ├── ActionNotFoundError         the agent has no action of that name
    │   └── DomainNotFoundError
    ├── DomainError                     a replicated domain can't be used: damaged, or of a newer version
    │   └── DomainFullError             retryable   not applied     its log can't be compacted
    ├── ProposalUnknownError            outcome UNKNOWN: ask `status(id)`
    ├── MailboxFullError                retryable   not applied     the receiver does not keep up
    ├── BreakerOpenError                retryable   not applied     a circuit breaker refuses the call
    ├── OverloadError                   retryable   not applied     a rate limit or bulkhead refuses the call
    ├── PlacementError                  lists the reason per node
    │   ├── InfeasibleError             no node could ever take it, however empty
    │   └── BusyError                   retryable   not applied     some node could, but not now
    ├── NotSettledError                 the wish stands, but was not true in time
    ├── RolloutFailedError              the agents did not get ready under a changed spec
    ├── AgentError                      something is wrong in or with an agent
    │   ├── AgentUnavailableError       retryable   not applied     not running, or not sure it still may
    │   ├── AskTimeoutError             outcome UNKNOWN
    │   ├── QuorumError                 too few of those that were asked have answered
    │   ├── HandlerError                the handler raised
    │   ├── PayloadInvalidError         the payload does not fit the handler's model
    │   ├── ExpiredError                not applied     its deadline had passed before it was handled
    │   ├── UnhandledSignalError        the agent has no handler for the type
    │   ├── StepInDoubtError            a step of `ctx.once` may have been done: a person decides
    │   ├── StepNotDoneError            raised by a step of `ctx.once`: surely nothing has happened
    │   ├── StepTooLargeError           a step of `ctx.once` is done; its result could not be kept
    │   ├── ActionError                 an action has failed, for the last time
    │   │   ├── ActionInvalidError      its params or its result do not fit
    │   │   ├── PlanFailedError         a step of a plan has failed; those before it are undone
    │   │   └── BudgetError             a loop with a model has used up its rounds or tokens
    │   ├── TransitionError             not applied     the state machine has no such transition now
    │   ├── ProcessCrashedError         outcome UNKNOWN: what `ctx.run_process` ran has ended its process
    │   ├── SensorError                 a sensor can't sense, or its signals can't be stored now
    │   ├── StateTooLargeError
    │   └── StateInvalidError           the stored or new state does not fit the model
    └── RemoteError                     a peer's error whose class we do not know

`outcome` tells whether the operation may have happened all the same:
``not_applied`` it did not, ``unknown`` it may have. Fields carry data; the
message is one sentence for people. An error crosses the bus as `ErrorBody`
and is the same class again on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Outcome = Literal["not_applied", "unknown"]


class FoundationError(Exception):
    """The root: catch it to catch everything this library raises on purpose."""

    code: ClassVar[str] = "foundation"
    retryable: ClassVar[bool] = False
    outcome: ClassVar[Outcome] = "not_applied"

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        """What to do now, where we know."""
        self.details = details

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} {self.hint}"


class ConfigError(FoundationError):
    """Settings are wrong; raised before any I/O."""

    code = "config"


class ManifestError(ConfigError):
    """A manifest is wrong; says what, where, and what would be right."""

    code = "manifest"


class ServerError(FoundationError):
    """The nats-server cannot be started or used."""

    code = "server"


class LaunchError(FoundationError):
    """A node could not be started or removed by its launcher; says what that said."""

    code = "launch"


class BusError(FoundationError):
    """NATS did not do what we asked."""

    code = "bus"


class BusUnavailableError(BusError):
    """No connection or no JetStream leader; nothing was applied."""

    code = "bus.unavailable"
    retryable = True


class NoRespondersError(BusUnavailableError):
    """Nobody listens on the subject."""

    code = "bus.no_responders"


class BusTimeoutError(BusError):
    """No answer in time; the operation may have been applied all the same."""

    code = "bus.timeout"
    retryable = True
    outcome = "unknown"


class BusRefusedError(BusError):
    """The server refused: a limit, a missing stream, a bad request."""

    code = "bus.refused"


class PermissionDeniedError(BusRefusedError):
    """The credentials do not allow this subject."""

    code = "bus.permission_denied"


class PayloadTooLargeError(BusRefusedError):
    """Headers and payload exceed the server's ``max_payload``; nothing reached the wire."""

    code = "bus.payload_too_large"


class DecodeError(BusError):
    """Bytes that are none of our models."""

    code = "bus.decode"


class ConflictError(FoundationError):
    """Someone else was first."""

    code = "conflict"


class AlreadyExistsError(ConflictError):
    """The name is in use."""

    code = "conflict.exists"


class NodeNameTakenError(ConflictError):
    """A node of this name is alive."""

    code = "conflict.node_name_taken"


class StaleRevisionError(ConflictError):
    """The key changed since it was read: re-read and decide again."""

    code = "conflict.stale_revision"


class FencedError(ConflictError):
    """A newer activation owns the agent: stop, do not retry."""

    code = "conflict.fenced"


class LockLostError(ConflictError):
    """The lock, permit or leadership is not held any more: stop what it protected."""

    code = "lock.lost"


class NotLeaderError(ConflictError):
    """Somebody else leads the group, or nobody; `details["leader"]` says who, where it is known."""

    code = "group.not_leader"
    retryable = True


class LockTimeoutError(ConflictError):
    """Somebody else held the lock, the permits or the leadership for the whole time."""

    code = "lock.timeout"
    retryable = True


class BarrierBrokenError(ConflictError):
    """Not everyone came to the barrier in time; `details["missing"]` names them."""

    code = "barrier.broken"


class VoteClosedError(ConflictError):
    """The vote is decided or its time is over: the ballot does not count."""

    code = "vote.closed"


class ReservationLostError(ConflictError):
    """The reservation has expired or was released: what it held is not yours (any more)."""

    code = "reservation.lost"


class ProposalRejectedError(ConflictError):
    """The domain's validator refused the operation; nothing was applied."""

    code = "consensus.rejected"


class DomainBusyError(ConflictError):
    """Other proposals came first for the whole time; nothing was applied."""

    code = "consensus.busy"
    retryable = True


class NotFoundError(FoundationError):
    """There is no such thing."""

    code = "not_found"


class SignalNotFoundError(NotFoundError):
    """No signal or timer of that id is known, or not any more."""

    code = "not_found.signal"


class AgentNotFoundError(NotFoundError):
    """There is no agent of this id."""

    code = "not_found.agent"


class NodeNotFoundError(NotFoundError):
    """There is no node of this name."""

    code = "not_found.node"


class DeploymentNotFoundError(NotFoundError):
    """There is no deployment of this name."""

    code = "not_found.deployment"


class DeadLetterNotFoundError(NotFoundError):
    """There is no dead letter with this number."""

    code = "not_found.dead_letter"


class ActionNotFoundError(NotFoundError):
    """The agent has no action of this name."""

    code = "not_found.action"


class DomainNotFoundError(NotFoundError):
    """There is no replicated domain of this name."""

    code = "not_found.domain"


class DomainError(FoundationError):
    """A replicated domain can't be used: its log is damaged, or of a newer version than this code."""

    code = "consensus.domain"


class DomainFullError(DomainError):
    """The domain's log is at its limit, because no snapshot of it could be stored."""

    code = "consensus.full"
    retryable = True


class ProposalUnknownError(FoundationError):
    """The operation may have been accepted; `details["id"]` is what to ask `status` about."""

    code = "consensus.unknown"
    outcome = "unknown"


class MailboxFullError(FoundationError):
    """The receiver's mailbox is at its limit; the signal was not stored."""

    code = "mailbox_full"
    retryable = True


class BreakerOpenError(FoundationError):
    """What is to be called has failed too often; it was not called. `details["retry_in_s"]` says for how long."""

    code = "breaker_open"
    retryable = True


class OverloadError(FoundationError):
    """A rate limit or a bulkhead has no room; it was not called."""

    code = "overload"
    retryable = True


class PlacementError(FoundationError):
    """No node qualifies; `details` has the reason per node."""

    code = "placement"


class InfeasibleError(PlacementError):
    """No node could ever take it, however empty; `details["reasons"]` has one per node."""

    code = "placement.infeasible"


class BusyError(PlacementError):
    """Some node could take it, but not now; `details["reasons"]` has one per node."""

    code = "placement.busy"
    retryable = True


class NotSettledError(FoundationError):
    """The wish is stored, but was not true in time; the cluster goes on trying."""

    code = "not_settled"


class RolloutFailedError(FoundationError):
    """The agents did not get ready under a changed spec; `details` says what was done about it."""

    code = "rollout_failed"


class AgentError(FoundationError):
    """Something is wrong in or with an agent."""

    code = "agent"


class AgentUnavailableError(AgentError):
    """The agent is not running now, or its activation is not sure that it still may answer."""

    code = "agent.unavailable"
    retryable = True


class AskTimeoutError(AgentError):
    """No reply in time; the agent may have handled the question all the same."""

    code = "agent.ask_timeout"
    outcome = "unknown"


class QuorumError(AgentError):
    """Too few of those that were asked have answered; some may have handled the question."""

    code = "agent.quorum"
    outcome = "unknown"


class HandlerError(AgentError):
    """The agent's handler raised; its state is as before."""

    code = "agent.handler"


class PayloadInvalidError(AgentError):
    """The payload does not fit the handler's model; `details` has pydantic's list of errors."""

    code = "agent.payload_invalid"


class ExpiredError(AgentError):
    """The signal's deadline had passed before it was handled."""

    code = "expired"


class UnhandledSignalError(AgentError):
    """The agent has no handler for this type of signal."""

    code = "agent.unhandled_signal"


class StepInDoubtError(AgentError):
    """A step of `ctx.once` was begun, and it is not known whether it was done; not tried again."""

    code = "agent.step_in_doubt"


class StepNotDoneError(AgentError):
    """For steps of `ctx.once` to raise: surely nothing has happened, it may be begun again."""

    code = "agent.step_not_done"


class StepTooLargeError(AgentError):
    """A step of `ctx.once` is done, but what it returned is too large to be kept; not tried again."""

    code = "agent.step_too_large"


class ActionError(AgentError):
    """An action has failed, and is not tried again by itself; `details["action"]` names it."""

    code = "agent.action"


class ActionInvalidError(ActionError):
    """The params or the result of an action do not fit; `details["errors"]` says where."""

    code = "agent.action_invalid"


class PlanFailedError(ActionError):
    """A step of a plan has failed, and all before it are undone; not tried again for the same signal."""

    code = "agent.plan_failed"


class BudgetError(ActionError):
    """A loop with a model has used up its rounds or its tokens; not tried again."""

    code = "agent.budget"


class TransitionError(AgentError):
    """The state machine has no such transition in the state it is in, or a guard refused; nothing changed."""

    code = "agent.transition"


class ProcessCrashedError(AgentError):
    """What `ctx.run_process` ran has ended its process: whatever it did outside may have been done."""

    code = "agent.process_crashed"
    outcome = "unknown"


class SensorError(AgentError):
    """A sensor can't sense: what it watches is not there, or does not answer as it should."""

    code = "agent.sensor"


class StateTooLargeError(AgentError):
    """The agent's record would exceed the limit; nothing was overwritten."""

    code = "agent.state_too_large"


class StateInvalidError(AgentError):
    """A stored record or a new state does not fit the model; nothing was overwritten."""

    code = "agent.state_invalid"


class RemoteError(FoundationError):
    """A peer's error whose class we do not know; `details["code"]` has its code."""

    code = "remote"


def _all_errors(root: type[FoundationError]) -> dict[str, type[FoundationError]]:
    known = {root.code: root}
    for child in root.__subclasses__():
        known.update(_all_errors(child))
    return known


def error_from_wire(code: str, message: str, details: dict[str, Any]) -> FoundationError:
    """The error a peer raised, as the same class again (`RemoteError` where we don't know it)."""
    known = _all_errors(FoundationError).get(code)
    if known is None:
        return RemoteError(message, **{**details, "code": code})
    return known(message, **{k: v for k, v in details.items() if k not in ("message", "hint")})
