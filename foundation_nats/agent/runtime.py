"""`Runtime`: the `Workload` that runs agents: which it has, and what its node is told of them.

It claims agents (`claiming.py`), subscribes, publishes what the record's outbox still holds,
and reads what the mailbox holds beyond the cursor. The first item of every activation is its
`on_start`; it is reported running once that is stored. From then on an activation works by
itself, and asks its runtime for what all agents of a worker share: `commits`, `mailboxes`,
`post`, the pool that runs them, and the limits.

Guaranteed: an agent is in one place here: in memory, asleep (`dormitory.py`), or being
claimed; and what is told to stop while it is being claimed is not begun.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.agent import Agent
from foundation_nats.agent.claiming import Claims
from foundation_nats.agent.commits import Commits
from foundation_nats.agent.committing import store_first_base
from foundation_nats.agent.dormitory import Dormitory
from foundation_nats.agent.guards import Guards
from foundation_nats.agent.kin import WishingNursery
from foundation_nats.agent.loading import describe
from foundation_nats.agent.mailboxes import Mailboxes
from foundation_nats.agent.offload import Offload
from foundation_nats.agent.pool import RunnerPool
from foundation_nats.agent.post import Post
from foundation_nats.agent.replicated import follow
from foundation_nats.agent.trace import Trace
from foundation_nats.agent.turns import take_turn
from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, to_json
from foundation_nats.bus.streams import StreamReader
from foundation_nats.cluster.events import Events
from foundation_nats.consensus.replicas import Replicas
from foundation_nats.errors import (
    DecodeError,
    FencedError,
    FoundationError,
    PayloadTooLargeError,
)
from foundation_nats.node.blackbox import importing
from foundation_nats.node.busiest import Counted, Looks
from foundation_nats.node.hosting import HostContext, mark
from foundation_schemas import (
    AgentRecord,
    AgentReport,
    AgentStatus,
    BusiestReply,
    ClassInfo,
    DeploymentMeasure,
)

_LOST = ("node_down", "worker_died")
_STOP_MARGIN_S = 2.0


@dataclass(slots=True)
class Counts:
    """What a worker has done since it began."""

    handled: int = 0
    """Signals that took effect in memory; their commits follow."""
    answered: int = 0
    """Questions."""
    given_up: int = 0
    """Signals that became dead letters."""
    commits: int = 0
    failovers: int = 0
    """Agents that were taken over from a node or a worker that had died."""


class Runtime:
    """The agents of one worker process."""

    def __init__(self, host: HostContext) -> None:
        config = host.config
        self._host = host
        self.bus = host.bus
        self.subjects = host.subjects
        self.node = host.node
        self.is_valid = host.validity.is_valid
        self.blackbox = host.blackbox
        self.log = get_logger("agents").bind(worker=host.worker)
        self.pool = RunnerPool(host.scope, take_turn)
        self.state = Bucket(host.bus, host.subjects, "state")
        self._registry = Bucket(host.bus, host.subjects, "agents")
        self.in_memory_max = config.mailbox.in_memory_max
        self.outbox_max = config.mailbox.outbox_max
        self.state_max_bytes = config.mailbox.state_max_bytes
        self.emit_max_bytes = config.mailbox.emit_max_bytes
        self.steps_max_bytes = config.mailbox.steps_max_bytes
        self.outbox_max_bytes = config.mailbox.emit_max_bytes * 3 // 4
        self.attempts_max = config.mailbox.attempts_max
        self.handler_timeout_s = config.worker.handler_timeout_s
        self.ready_timeout_s = config.worker.ready_timeout_s
        self.stop_timeout_s = config.worker.stop_timeout_s
        self._retry_first_s = config.mailbox.retry_first_s
        self.writer_json = to_json(
            {"node": host.node, "incarnation": host.incarnation, "worker": host.worker}
        )
        self.attempts: dict[str, tuple[int, int]] = {}
        self.trace = Trace()
        self._guards = Guards(Events(host.bus, host.subjects, f"worker:{host.worker}").emit)
        self.counts = Counts()
        self._offload = Offload(
            threads_max=config.worker.threads_max,
            processes_max=config.worker.processes_max,
            box=host.blackbox,
        )
        self._replicas = Replicas(host.bus, host.subjects, config.replicas)
        self._activations: dict[str, Activation] = {}
        self._looks = Looks()
        self._fingerprint = 0
        self._claiming: dict[str, int] = {}
        """Agent to the epoch under which it is being claimed; 0: told to stop meanwhile."""
        self._parked: set[Activation] = set()
        self._moved: set[Activation] = set()
        self._dormitory = Dormitory(self, host.scope, after_s=config.worker.hibernate_after_s)
        signals = StreamReader(host.bus, host.subjects.signals_stream)
        self.commits = Commits(
            host.bus,
            self.state,
            host.scope,
            worker=host.worker,
            incarnation=host.incarnation,
            holds=self.holds,
        )
        self.post = Post(
            host.bus,
            host.subjects,
            signals,
            host.scope,
            self.commits,
            window_s=config.mailbox.duplicate_window_s,
            full_patience_s=config.mailbox.full_patience_s,
            log=self.log,
        )
        self.mailboxes = Mailboxes(
            host.bus,
            host.subjects,
            signals,
            host.scope,
            node=host.node,
            in_memory_max=self.in_memory_max,
            sweep_every_s=config.mailbox.sweep_every_s,
            activations=self._activations,
            sleepers=self._dormitory.sleepers,
            on_doubt=self.commits.resume,
            log=self.log,
        )
        self._claims = Claims(
            host,
            self.state,
            activate=partial(Activation, self),
            attempts=self.attempts,
            report=self._report,
            writer_json=self.writer_json,
            replicas=self._replicas,
            guards=self._guards,
            offload=self._offload,
            nursery=WishingNursery(host.bus, host.subjects, self.is_valid, describe),
            log=self.log,
        )
        host.scope.start(self._offload.until_closed(), "offload")
        host.scope.start(self._replicas.until_closed(), "domains")
        if host.domains:
            host.scope.start(follow(self._replicas, host.domains, self.log), "follow")

    # ---- the workload ---------------------------------------------------------------

    async def start(self, records: Sequence[AgentRecord]) -> None:
        """Activate these agents; see `Workload.start`."""
        fresh = []
        for record in records:
            self._wake_no_more(record.id, record.epoch - 1)
            known = self._activations.get(record.id)
            claiming = self._claiming.get(record.id, 0)
            if known is not None and known.epoch < record.epoch:
                # Assigned anew to this very worker: the old activation is over.
                known.fail(FencedError(f"{record.id} was claimed anew."))
                known = None
            if known is None and claiming < record.epoch and not self._sleeps(record):
                self._claiming[record.id] = record.epoch
                fresh.append(record)
        try:
            claimed = await self._claims.claim(fresh)
            # What was told to stop, or assigned anew, while it was being claimed is not begun.
            activations = [item for item in claimed if self._claiming.get(item.id) == item.epoch]
            failpoint("claim.after_cas")
            await self._take_over(activations)
        finally:
            for record in fresh:
                if self._claiming.get(record.id) == record.epoch:
                    del self._claiming[record.id]

    async def stop(
        self, agents: dict[str, int], reason: str, targets: Mapping[str, str] | None = None
    ) -> None:
        """Stop these agents; see `Workload.stop`."""
        ending = []
        for agent, epoch in agents.items():
            activation = self._activations.get(agent)
            if activation is not None and activation.epoch <= epoch:
                activation.target = None if targets is None else targets.get(agent)
                ending.append(self._end(activation, reason))
            elif activation is None:
                self._wake_no_more(agent, epoch)
                if 0 < self._claiming.get(agent, 0) <= epoch:
                    self._claiming[agent] = 0  # the claim that is under way ends in nothing
                self._report(agent, epoch, AgentStatus.STOPPED, reason)
        if ending:
            await asyncio.gather(*ending)

    def _sleeps(self, record: AgentRecord) -> bool:
        sleeper = self._dormitory.sleepers.get(record.id)
        return sleeper is not None and sleeper.epoch >= record.epoch

    def _wake_no_more(self, agent: str, epoch: int) -> None:
        """If it sleeps here under *epoch* or an earlier one, it is not ours any more."""
        sleeper = self._dormitory.remove(agent, epoch=epoch)
        if sleeper is not None:
            self._fingerprint ^= mark(agent, sleeper.epoch)

    async def _end(self, activation: Activation, reason: str) -> None:
        stopped = activation.stop(reason)
        done, _ = await asyncio.wait([stopped], timeout=self.stop_timeout_s)
        if not done and activation.task is not None:
            self.log.warning("handler cancelled to stop the agent", agent=activation.id)
            activation.task.cancel()
            done, _ = await asyncio.wait([stopped], timeout=self.stop_timeout_s + _STOP_MARGIN_S)
        if not done:
            self.ended(activation)

    async def review(self) -> None:
        """End what others were given meanwhile; see `Workload.review`."""
        held = list(self._activations.values())
        claiming = {agent: epoch for agent, epoch in self._claiming.items() if epoch}
        asleep = list(self._dormitory.sleepers.values())
        agents = [*{*claiming, *(item.id for item in held), *(item.id for item in asleep)}]
        if not agents:
            return
        entries = await self._registry.read_many(agents, by_now=True)
        mine = {
            agent: record.epoch
            for agent, entry in entries.items()
            if (record := _assignment(entry)) is not None and record.node == self.node
        }
        for activation in held:
            if mine.get(activation.id) != activation.epoch:
                activation.fail(FencedError(f"{activation.id} was given to another meanwhile."))
        for sleeper in asleep:
            if mine.get(sleeper.id) != sleeper.epoch:
                self._wake_no_more(sleeper.id, sleeper.epoch)
        for agent, epoch in claiming.items():
            if mine.get(agent) != epoch and self._claiming.get(agent) == epoch:
                self._claiming[agent] = 0

    def resume(self) -> None:
        """Go on with what was parked."""
        parked, self._parked = self._parked, set()
        for activation in parked:
            activation.resume()

    def running(self) -> dict[str, int]:
        """Id to epoch of every activation in memory."""
        asleep = {agent: item.epoch for agent, item in self._dormitory.sleepers.items()}
        return {agent: item.epoch for agent, item in self._activations.items()} | asleep

    def fingerprint(self) -> int:
        """Changes whenever `running` does; one that holds the same shows the same."""
        return self._fingerprint

    def domains(self) -> dict[str, int]:
        """Domain to the revision up to which it is applied here."""
        return dict(self._replicas.revisions())

    def backlog(self) -> int:
        """Signals received and not yet handled."""
        return sum(
            item.mailbox.backlog for item in self._activations.values() if item.mailbox.queue
        )

    def doing(self, agent: str) -> str:
        """The type of the signal in hand; see `Workload.doing`."""
        activation = self._activations.get(agent)
        signal = None if activation is None else activation.agent.ctx.signal
        return "" if signal is None else signal.type

    def measure(self, deployments: Collection[str]) -> dict[str, DeploymentMeasure]:
        """What the agents of these deployments have to do, of those in memory."""
        found: dict[str, list[Activation]] = {}
        sleeping: dict[str, int] = {}
        for item in self._activations.values():
            if (name := _deployment_of(item.id, deployments)) is not None:
                found.setdefault(name, []).append(item)
        for agent in self._dormitory.sleepers:
            if (name := _deployment_of(agent, deployments)) is not None:
                sleeping[name] = sleeping.get(name, 0) + 1
        return {
            name: _measured(found.get(name, []), sleeping.get(name, 0))
            for name in found.keys() | sleeping.keys()
        }

    def busiest(self, limit: int) -> BusiestReply:
        """Which agents have most to do; see `node/busiest.py`."""
        counted = [
            Counted(item.id, item.consumed, item.asked, item.mailbox.backlog, item.mailbox.behind)
            for item in self._activations.values()
        ]
        return self._looks.look(monotonic(), counted, limit)

    def consumed(self) -> dict[str, tuple[int, int]]:
        """Committed cursors that moved since the last call, and the signals consumed so far."""
        # A number is worth nothing while the stream may have given it out again.
        moved = {item for item in self._moved if item.mailbox.checked}
        self._moved = {
            item for item in self._moved - moved if self._activations.get(item.id) is item
        }
        found = {}
        for item in moved:
            place = (item.committed_cursor, item.consumed)
            # Of what an agent keeps to be looked at, the trimmer shall know nothing.
            known = place if item.past is None else item.past.boundary()
            if known is not None:
                found[item.id] = known
        return found

    def counters(self) -> dict[str, int]:
        """What was done since this worker began, by name."""
        return asdict(self.counts)

    def breakers(self) -> dict[str, str]:
        """The breakers of handlers' calls that have ever opened, to their states."""
        now = monotonic()
        return {item.name: str(item.state(now)) for item in self._guards.watched() if item.opened}

    def describe(self, runs: Sequence[str]) -> list[ClassInfo]:
        """What is behind each *run* here."""
        return [self.blackbox.call(describe, run, **importing(run)._asdict()) for run in runs]

    async def _take_over(self, activations: list[Activation]) -> None:
        """Subscribe first, catch up second; then begin."""
        for activation in activations:
            origin = activation.recovered
            self.counts.failovers += origin is not None and origin.reason in _LOST
            self._activations[activation.id] = activation
            self._fingerprint ^= mark(activation.id, activation.epoch)
            activation.route = self.bus.subscribe(
                self.subjects.agent(activation.id), activation.on_message
            )
            store_first_base(activation)
            activation.begin()
        failpoint("claim.after_subscribe")
        for activation in activations:
            self.post.recover(activation)
        await self.mailboxes.look_into(activations)

    # ---- what activations ask of their runtime ----------------------------------

    def park(self, activation: Activation) -> None:
        """Wait until the right to answer is back."""
        self._parked.add(activation)

    def check_size(self, subject: str, body: bytes) -> None:
        """Refuse what the server would refuse.

        Raises:
            PayloadTooLargeError: with room for our headers it exceeds ``max_payload``.
        """
        limit = self.bus.max_payload - 512
        if len(body) > limit:
            raise PayloadTooLargeError(
                f"A signal of {len(body):,} bytes for {subject} exceeds the limit of {limit:,}.",
                hint="Send a reference to the data instead.",
            )

    def background(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something beside the handlers; whoever asks for it ends it."""
        return self._host.scope.start(coroutine, name)

    def retry_delay(self, attempt: int) -> float:
        """Back-off before the next attempt, with jitter."""
        return float(self._retry_first_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))

    def moved(self, activation: Activation) -> None:
        """Its committed cursor has moved."""
        self._moved.add(activation)

    # ---- ends -------------------------------------------------------------------

    def revive(self, record: AgentRecord, cls: type[Agent], entry: Entry) -> Activation:
        """An activation that goes on from *entry* under the epoch that it has: nothing is claimed.

        Raises:
            FencedError, StateInvalidError, ConfigError
        """
        activation, _ = self._claims.prepare(record, cls, entry)
        activation.revision = entry.revision
        self._activations[record.id] = activation
        self.post.recover(activation)
        return activation

    def lay_down(self, activation: Activation) -> None:
        """It sleeps from now on; its fingerprint stays, because it is still here."""
        del self._activations[activation.id]
        self._parked.discard(activation)
        self._moved.add(activation)
        self.commits.forget(activation)
        self._dormitory.lay_down(activation)
        activation.agent.ctx._home = None  # a circle would keep its memory until a full collection
        self._report(activation.id, activation.epoch, AgentStatus.HIBERNATED, None)

    def holds(self, activation: Activation) -> bool:
        """Whether it is still one of ours."""
        return self._activations.get(activation.id) is activation

    def gone(self, agent: str, epoch: int, error: FoundationError) -> None:
        """One that slept can't wake."""
        self._fingerprint ^= mark(agent, epoch)
        if isinstance(error, FencedError):
            self._report(agent, epoch, AgentStatus.STOPPED, "fenced")
        else:
            self.log.error("agent failed", agent=agent, error=str(error))
            self._report(agent, epoch, AgentStatus.FAILED, str(error))

    def report_running(self, activation: Activation) -> None:
        """It has started."""
        self._dormitory.admit(activation)
        self._report(activation.id, activation.epoch, AgentStatus.RUNNING, None)

    def stop_one(self, activation: Activation, reason: str) -> None:
        """It asked to be stopped."""
        self._host.scope.start(self._end(activation, reason), "stop")

    def ended(self, activation: Activation) -> None:
        """It has stopped in good order (or as far as it would)."""
        if self._forget(activation):
            self._report(activation.id, activation.epoch, AgentStatus.STOPPED, activation.stopping)

    def failed(self, activation: Activation, error: FoundationError) -> None:
        """It ended because of an error."""
        if not self._forget(activation):
            return
        if isinstance(error, FencedError):
            self.log.info("activation ended: fenced", agent=activation.id, epoch=activation.epoch)
            self._report(activation.id, activation.epoch, AgentStatus.STOPPED, "fenced")
        else:
            self.log.error("agent failed", agent=activation.id, error=str(error))
            self._report(activation.id, activation.epoch, AgentStatus.FAILED, str(error))

    def _forget(self, activation: Activation) -> bool:
        if activation.sensing is not None:
            activation.sensing.stop()
        if self._activations.get(activation.id) is not activation:
            return False
        del self._activations[activation.id]
        self._fingerprint ^= mark(activation.id, activation.epoch)
        if activation.route is not None:
            self.bus.unsubscribe(activation.route)
        self._parked.discard(activation)
        self.attempts.pop(activation.id, None)
        self._moved.add(activation)
        activation.agent.ctx._home = None
        if activation.stopped is not None and not activation.stopped.done():
            activation.stopped.set_result(None)
        self.commits.forget(activation)
        return True

    def _report(self, agent: str, epoch: int, status: AgentStatus, reason: str | None) -> None:
        self._host.report(AgentReport(id=agent, epoch=epoch, status=status, reason=reason))


def _assignment(entry: Entry) -> AgentRecord | None:
    """To whom the registry gives an agent; what can't be read was not written for us."""
    if entry.value is None:
        return None
    try:
        return decode(AgentRecord, entry.value)
    except DecodeError:
        return None


def _deployment_of(agent: str, deployments: Collection[str]) -> str | None:
    # Ids of replicas are NAME-0, NAME-1 …; no other agent may be called like that.
    name = agent.rpartition("-")[0]
    return name if name in deployments else agent if agent in deployments else None


def _measured(items: Sequence[Activation], sleeping: int) -> DeploymentMeasure:
    gauges: dict[str, list[float]] = {}
    for item in items:
        for name, value in item.agent.ctx._gauges.items():
            gauges.setdefault(name, []).append(value)
    return DeploymentMeasure(
        agents=len(items) + sleeping,
        backlog=sum(item.mailbox.backlog for item in items),
        gauges=gauges,
    )
