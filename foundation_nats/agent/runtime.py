"""`Runtime`: the `Workload` that runs agents: claim in bulk, take in, recover, end.

To claim: read the records, refuse those of a newer epoch, rewrite each with
this epoch by compare-and-set (which fences every older activation), subscribe,
publish what the record's outbox still holds, and read what the mailbox holds
beyond the cursor. The first item of every activation is its `on_start`; it is
reported running once that is stored.

A republished copy is at most once, and a lost one with nothing behind it
leaves no gap to see. Hence the sweep: on a timer, at once after a reconnect,
and at a stream's new leader, the last sequence of every mailbox is compared
with what was taken in. An idle cluster pays one request per sweep. The sweep and
every claim also find out whether the stream went back (`rewind.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from secrets import token_hex
from typing import Any

import orjson

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.agent import Agent
from foundation_nats.agent.committing import (
    LedgerKeeper,
    commit,
    give_up_publishing,
    store,
    store_first_base,
    stored_as,
)
from foundation_nats.agent.context import Context
from foundation_nats.agent.dormitory import Dormitory
from foundation_nats.agent.guards import Guards
from foundation_nats.agent.kin import WishingNursery, join
from foundation_nats.agent.loading import describe, load_class
from foundation_nats.agent.offload import Offload
from foundation_nats.agent.outbox import (
    drop_published,
    find_stored,
    is_repeat_remembered,
    parse_time,
)
from foundation_nats.agent.past import Past
from foundation_nats.agent.pool import RunnerPool
from foundation_nats.agent.publishing import publish_head, publish_late, publish_recovered
from foundation_nats.agent.record import OutboxItem, decode_record, encode_record
from foundation_nats.agent.replicated import follow
from foundation_nats.agent.rewind import has_lost_its_clock, is_rewound, just_after, stamp
from foundation_nats.agent.state import dump_state, first_state, load_state
from foundation_nats.agent.steps import StepLedger
from foundation_nats.agent.trace import Trace
from foundation_nats.agent.turns import take_turn
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode, to_json
from foundation_nats.bus.streams import (
    PAGE,
    OnAck,
    PubAck,
    StoredMessage,
    StreamReader,
    append,
    append_nowait,
    identity,
)
from foundation_nats.bus.subjects import STREAM_LEADER_ELECTED
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.events import Events
from foundation_nats.consensus.replicas import Replicas
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    DecodeError,
    FencedError,
    FoundationError,
    MailboxFullError,
    NotFoundError,
    PayloadTooLargeError,
    StaleRevisionError,
    StateInvalidError,
)
from foundation_nats.node.blackbox import STARTING, importing
from foundation_nats.node.busiest import Counted, Looks
from foundation_nats.node.hosting import HostContext, mark
from foundation_schemas import (
    AgentRecord,
    AgentReport,
    AgentStatus,
    BusiestReply,
    ClassInfo,
    ClusterEvent,
    DeploymentMeasure,
    StateRecord,
)

_CLAIM_ROUNDS = 8
_LOST = ("node_down", "worker_died")
_COMMITS_MAX = 32
_CLEAR_AFTER_S = 0.5
_SWEEPS = 2
"""Of one state of the stream: a replica that lags may answer the first."""
_STOP_MARGIN_S = 2.0
_ANNOUNCE_AFTER_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
_BUCKET_PATIENCE_S = 1.0
"""How long the state bucket may be missing before that counts."""


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
        self.signals = StreamReader(host.bus, host.subjects.signals_stream)
        self._dead = StreamReader(host.bus, host.subjects.dead_stream)
        self.in_memory_max = config.mailbox.in_memory_max
        self.outbox_max = config.mailbox.outbox_max
        self.state_max_bytes = config.mailbox.state_max_bytes
        self.emit_max_bytes = config.mailbox.emit_max_bytes
        self._history = config.mailbox.history
        self._history_max = config.mailbox.mailbox_max // 4
        self.steps_max_bytes = config.mailbox.steps_max_bytes
        self.outbox_max_bytes = config.mailbox.emit_max_bytes * 3 // 4
        self.attempts_max = config.mailbox.attempts_max
        self.handler_timeout_s = config.worker.handler_timeout_s
        self.ready_timeout_s = config.worker.ready_timeout_s
        self.stop_timeout_s = config.worker.stop_timeout_s
        self._window_s = config.mailbox.duplicate_window_s
        self._full_patience_s = config.mailbox.full_patience_s
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
        self._nursery = WishingNursery(host.bus, host.subjects, self.is_valid, describe)
        self._activations: dict[str, Activation] = {}
        self._looks = Looks()
        self._fingerprint = 0
        self._claiming: dict[str, int] = {}
        """Agent to the epoch under which it is being claimed; 0: told to stop meanwhile."""
        self._parked: set[Activation] = set()
        self._moved: set[Activation] = set()
        self.commits_in_flight = 0
        self._commit_line: dict[Activation, None] = {}
        self._clear: dict[Activation, float] = {}
        self._clear_some = asyncio.Event()
        self._commit_waiters: dict[Activation, list[asyncio.Future[None]]] = {}
        self._catching_up: set[Activation] = set()
        self._resolving: set[Activation] = set()
        self._swept_to = (0, 0)
        """(Last sequence of the stream, how often it was swept up to there)."""
        self._sweep_now = asyncio.Event()
        self._era = 0
        """Counts the moments since which the stream may have gone back."""
        self._stream_is: tuple[str, str] | None = None
        self._dormitory = Dormitory(self, host.scope, after_s=config.worker.hibernate_after_s)
        host.scope.start(self._sweep_loop(config.mailbox.sweep_every_s), "sweep")
        host.scope.start(self._clear_loop(), "clear")
        host.scope.start(self._offload.until_closed(), "offload")
        host.scope.start(self._replicas.until_closed(), "domains")
        if host.domains:
            host.scope.start(follow(self._replicas, host.domains, self.log), "follow")
        self.bus.on_disconnect(self._uncheck)
        self.bus.on_reconnect(self._disturbed)
        self.bus.subscribe(STREAM_LEADER_ELECTED, self._on_advisory)

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
            await self._claim_all(fresh)
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

    # ---- claim ------------------------------------------------------------------

    async def _claim_all(self, records: list[AgentRecord]) -> None:
        classes: dict[str, type[Agent] | ConfigError] = {}
        ready = []
        for record in records:
            run = record.spec.run
            if run not in classes:
                try:
                    # Should the import end the process, its agent is to blame.
                    classes[run] = self.blackbox.call(
                        load_class, run, agent=record.id, sequence=STARTING
                    )
                except ConfigError as error:
                    classes[run] = error
            found = classes[run]
            if isinstance(found, ConfigError):
                self._report(record.id, record.epoch, AgentStatus.FAILED, str(found))
            else:
                ready.append((record, found))
        failpoint("claim.read")
        durable = [record.id for record, cls in ready if _is_durable(record, cls)]
        while True:
            try:
                entries = await self.state.read_many(durable)
                break
            except (BusTimeoutError, BusUnavailableError) as error:
                if await self._is_bucket_gone():
                    for record, cls in ready:
                        if _is_durable(record, cls):
                            reason = f"the server has no stream {self.state.stream}"
                            self._report(record.id, record.epoch, AgentStatus.FAILED, reason)
                    ready = [(record, cls) for record, cls in ready if not _is_durable(record, cls)]
                    entries = {}
                    break
                self.log.warning("records not readable yet", error=str(error))
                await asyncio.sleep(0.2)
        claims = [self._claim(record, cls, entries.get(record.id)) for record, cls in ready]
        claimed = await asyncio.gather(*claims)
        # What was told to stop, or assigned anew, while it was being claimed is not begun.
        activations = [
            item
            for item in claimed
            if item is not None and self._claiming.get(item.id) == item.epoch
        ]
        failpoint("claim.after_cas")
        await self._take_over(activations)

    async def _is_bucket_gone(self) -> bool:
        try:
            await self.state.reader.info()
        except NotFoundError:
            return True
        except BusError:
            return False
        return False

    async def _claim(
        self, record: AgentRecord, cls: type[Agent], entry: Entry | None
    ) -> Activation | None:
        """Rewrite the record under the new epoch; None if that is not ours to do."""
        recovered_at = entry.time if entry is not None else ""
        for _ in range(_CLAIM_ROUNDS):
            try:
                activation, payload = self._prepare(record, cls, entry)
                activation.outbox.recovered_at = activation.outbox.recovered_at or recovered_at
                if payload is not None:
                    await self._write_claim(activation, payload)
                return activation
            except FencedError:
                self.log.info("claim refused: a newer activation exists", agent=record.id)
                return None
            except (StateInvalidError, PayloadTooLargeError, ConfigError) as error:
                self._report(record.id, record.epoch, AgentStatus.FAILED, str(error))
                return None
            except (StaleRevisionError, BusTimeoutError, BusUnavailableError):
                try:
                    entry = await self._read_surely(record.id)
                except StateInvalidError as error:
                    self._report(record.id, record.epoch, AgentStatus.FAILED, str(error))
                    return None
                if entry is not None and self._is_my_claim(record, entry):
                    activation, _ = self._prepare(record, cls, entry)
                    activation.revision = entry.revision
                    activation.outbox.recovered_at = activation.outbox.recovered_at or recovered_at
                    return activation
                recovered_at = entry.time if entry is not None else ""
        self._report(record.id, record.epoch, AgentStatus.FAILED, "the record could not be claimed")
        return None

    def _is_my_claim(self, record: AgentRecord, entry: Entry) -> bool:
        if entry.value is None:
            return False
        found = decode_record(record.id, entry.value)
        return found.epoch == record.epoch and found.writer.worker == self._host.worker

    def _prepare(
        self, record: AgentRecord, cls: type[Agent], entry: Entry | None
    ) -> tuple[Activation, bytes | None]:
        """The activation that continues *entry*, and the record that claims it."""
        stored: StateRecord | None = None
        if entry is not None and entry.value is not None:
            stored = decode_record(record.id, entry.value)
            if stored.epoch > record.epoch and not planted("skip_epoch_check"):
                raise FencedError(f"{record.id} is at epoch {stored.epoch}.")
        agent = cls()
        agent.ctx = Context(
            record.id, config=record.spec.config or None, node=self.node, epoch=record.epoch
        )
        agent.ctx._agent = agent
        agent.ctx._consensus = self._replicas
        agent.ctx._guards = self._guards
        agent.ctx._offload = self._offload
        agent.ctx.bus, agent.ctx.subjects = self.bus, self.subjects
        if cls.skills:
            _ = agent.skill  # a skill that is configured wrongly is an error here
        if not _is_durable(record, cls):
            agent.durable = False  # type: ignore[misc]
            stored = None
        outbox: list[OutboxItem] = []
        if stored is None or stored.state is None:
            agent.state = first_state(cls.State)
        else:
            agent.state = load_state(cls.State, stored.state, version=stored.schema_version)
            outbox = [
                OutboxItem(item.subject, item.msg_id, orjson.dumps(item.body), item.headers)
                for item in stored.outbox
            ]
        join(agent, record.spec.parent, stored.family if stored else None, self._nursery)
        recovered = record.recovered_from
        past = self._past(agent, stored)
        activation = Activation(
            self,
            record,
            agent,
            state_json=dump_state(agent.state),
            cursor=stored.cursor if stored else 0,
            mark=stored.mark if stored else "",
            commit_no=(stored.commit if stored else 0) + 1,
            revision=entry.revision if entry is not None else 0,
            salt=stored.salt if stored else token_hex(8),
            emitted=stored.emitted if stored else 0,
            outbox=outbox,
            recovered=recovered if stored or not agent.durable else None,
            skip=stored.skip if stored else [],
            ahead=dict(stored.ahead) if stored else {},
            steps=StepLedger(stored.steps, bytes_max=self.steps_max_bytes)
            if stored and stored.steps
            else None,
            positions=stored.sensors or None if stored else None,
            past=past,
        )
        agent.ctx._home = LedgerKeeper(activation)
        if stored is not None and outbox:
            # A claim rewrites the record: what it found in the outbox is as old as before.
            activation.outbox.recovered_at = stored.outbox_since or (entry.time if entry else "")
        attempt = stored.attempt if stored else None
        suspect = None if recovered is None else recovered.sequence
        if suspect is not None and (attempt is None or attempt[0] != suspect):
            attempt = [suspect, 1]
        if attempt is not None:
            self.attempts[record.id] = (attempt[0], attempt[1])
        activation.cautious = attempt is not None
        if not agent.durable:
            return activation, None
        payload = encode_record(
            epoch=record.epoch,
            commit=activation.commit_no,
            writer=self.writer_json,
            cursor=activation.mailbox.cursor,
            mark=activation.mailbox.mark,
            run=record.spec.run,
            state=activation.state_json,
            salt=activation.salt,
            emitted=activation.emitted,
            outbox=outbox,
            attempt=self.attempts.get(record.id) if attempt is not None else None,
            outbox_since=activation.outbox.recovered_at,
            skip=activation.mailbox.skip,
            ahead=activation.mailbox.ahead,
            steps=activation.step_ledger,
            sensors=activation.positions,
            family=agent.ctx._family_kept,
            schema_version=cls.State.version,
            past=None if past is None else past.encoded(),
        )
        return activation, payload

    def _past(self, agent: Agent, stored: StateRecord | None) -> Past | None:
        """What it keeps of what it has handled, if it shall keep any."""
        said = type(agent).history
        keep = min(self._history if said is None else said, self._history_max)
        if keep <= 0 or not agent.durable:
            return None
        past = Past(keep, stored.past if stored else None, most=2 * self._history_max)
        known = None if stored is None or stored.state is None else stored.schema_version
        if known is not None and known != type(agent).State.version:
            past.aside()  # it was migrated
        return past

    async def _write_claim(self, activation: Activation, payload: bytes) -> None:
        await self.bus.wait_room()
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_ack(ack: PubAck | FoundationError) -> None:
            if done.done():
                return
            if isinstance(ack, PubAck):
                done.set_result(ack.sequence)
            else:
                done.set_exception(ack)

        self.state.replace_nowait(
            activation.id, payload, expected=activation.revision, on_ack=on_ack
        )
        activation.revision = await done

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
        late = [item for item in activations if item.outbox]
        for activation in late:
            self._host.scope.start(self._recover_outbox(activation), "recover-outbox")
        self._swept_to = (0, 0)
        try:
            await self.bus.flush()
            await self._look_for_unread(activations)
        except (BusError, NotFoundError) as error:
            self.log.warning("mailboxes not readable yet", error=str(error))
            self._sweep_soon()

    async def _recover_outbox(self, activation: Activation) -> None:
        """Publish what the earlier activation had stored and perhaps not published."""
        while activation.failure is None:
            try:
                await drop_published(
                    self._reader_of, self.signals, activation.outbox, window_s=self._window_s
                )
                break
            except (BusTimeoutError, BusUnavailableError, NotFoundError):
                await asyncio.sleep(0.3)
        failpoint("claim.after_outbox")
        publish_recovered(activation)
        if not activation.outbox:
            activation.outbox.recovering = False
        if not activation.outbox and activation.outbox.committed:
            self.clear_later(activation)

    def _reader_of(self, subject: str) -> StreamReader | None:
        if subject.startswith(self.subjects.mailbox("")):
            return self.signals
        if subject.startswith(self.subjects.dead("")):
            return self._dead
        return None

    async def _read_surely(self, agent: str) -> Entry | None:
        """The record from the leader, however long that takes.

        Raises:
            StateInvalidError: the state bucket is gone.
        """
        delay = 0.02
        missing_since: float | None = None
        while True:
            try:
                await self.bus.wait_connected(60.0)
                return await self.state.read(agent)
            except (BusTimeoutError, BusUnavailableError):
                pass
            except NotFoundError as error:
                missing_since = missing_since or monotonic()
                if monotonic() - missing_since > _BUCKET_PATIENCE_S:
                    raise StateInvalidError(
                        f"The state of {agent} can't be stored: the server has no stream "
                        f"{self.state.stream}.",
                        hint="Restore it from a backup, or see `foundation doctor`.",
                    ) from error
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    # ---- intake -----------------------------------------------------------------

    def catch_up(self, activation: Activation) -> None:
        """Read on from the stream until the live copies connect."""
        if activation not in self._catching_up:
            self._catching_up.add(activation)
            self._host.scope.start(self._catch_up(activation), "catch-up")

    async def _catch_up(self, activation: Activation) -> None:
        delay = 0.02
        subject = self.subjects.mailbox(activation.id)
        try:
            while (
                activation.mailbox.behind
                and activation.failure is None
                and not activation.mailbox.rewinding
            ):
                if activation.mailbox.backlog > self.in_memory_max // 2:
                    return  # it asks again when it has handled what it holds
                failpoint("catchup.page")
                try:
                    if not activation.mailbox.checked:
                        await self._check(activation)
                        continue
                    era = self._era
                    room = max(1, self.in_memory_max - activation.mailbox.backlog)
                    messages, more = await self.signals.page(
                        subject, activation.mailbox.fetched + 1, batch=min(PAGE, room)
                    )
                    if era != self._era:
                        continue
                except (BusError, FoundationError) as error:
                    self.log.debug("catch-up will be retried", error=str(error))
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 1.0)
                    continue
                if activation.take_page(messages, bool(more)):
                    return
                if not messages:
                    # A replica that lags behind what was already seen live; or the
                    # signals heard of were trimmed or discarded meanwhile.
                    last = await self.signals.last_from_leader(subject)
                    if last is None or last.sequence <= activation.mailbox.fetched:
                        activation.mailbox.seen = activation.mailbox.fetched
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 1.0)
        except (BusError, NotFoundError) as error:
            self.log.debug("catch-up left to the sweep", error=str(error))
            activation.mailbox.behind = False
            self._sweep_soon()
        finally:
            self._catching_up.discard(activation)

    async def _check(self, activation: Activation) -> None:
        """Compare its place in the mailbox with the stream as it is now.

        Raises:
            BusError
        """
        era = self._era
        if await self._find_place(activation) is not None:
            activation.rewound()
        elif era == self._era:
            activation.mailbox.checked = True

    async def _find_place(self, activation: Activation) -> int | None:
        """The sequence behind which all is new; None: the stream did not go back."""
        subject = self.subjects.mailbox(activation.id)
        cursor, mark = activation.mailbox.fetched, activation.mailbox.fetched_mark
        if not mark:
            return None
        info = await self.signals.info()
        found = await self.signals.first_since(subject, just_after(mark))
        while found is not None and found.sequence <= cursor:
            if is_rewound(found.sequence, found.time, cursor=cursor, mark=mark):
                return found.sequence - 1
            # Leaders whose clocks differ: later in the stream, and yet earlier.
            found = await self.signals.next_of(subject, found.sequence + 1)
        if has_lost_its_clock(info, cursor=cursor, mark=mark):
            return int(info["state"]["last_seq"])
        return None

    async def find_place(self, activation: Activation) -> int | None:
        """`_find_place`, however long that takes; None also when the activation ends."""
        delay = 0.02
        while activation.failure is None and activation.stopping is None:
            try:
                await self.bus.wait_connected(60.0)
                return await self._find_place(activation)
            except (BusError, NotFoundError) as error:
                self.log.debug("stream not readable yet", error=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
        return None

    def report_rewound(self, activation: Activation, before: int) -> None:
        """Its cursor has followed the stream back from *before*."""
        message = (
            f"The signals of {activation.id} went back from {before} to {activation.mailbox.cursor}: "
            "the broker has lost the latest it had acknowledged. What came since is handled."
        )
        self.log.error("stream rewound", agent=activation.id, error=message)
        event = ClusterEvent(
            topic="agent",
            what="stream_rewound",
            at=utc_text(),
            source=self.node,
            message=message,
            data={
                "agent": activation.id,
                "stream": self.signals.stream,
                "before": before,
                "after": activation.mailbox.cursor,
            },
        )
        self._host.scope.start(self._announce(event), "announce")

    async def _announce(self, event: ClusterEvent) -> None:
        """Store an event; more than once, because it is told while streams still elect leaders."""
        subject = self.subjects.event(event.topic, event.what)
        headers = {"Nats-Msg-Id": token_hex(16)}
        for delay in _ANNOUNCE_AFTER_S:
            await asyncio.sleep(delay)
            try:
                await append(self.bus, subject, encode(event), headers=headers, timeout=2.0)
                return
            except FoundationError as error:
                self.log.debug("event not stored yet", what=event.what, error=str(error))

    def _uncheck(self) -> None:
        self._era += 1
        for activation in self._activations.values():
            activation.mailbox.uncheck()

    def _disturbed(self) -> None:
        self._uncheck()
        self._sweep_soon()

    def _sweep_soon(self) -> None:
        self._swept_to = (0, 0)
        self._sweep_now.set()
        for activation in list(self._resolving):
            activation.resume()

    def _on_advisory(self, message: Message) -> None:
        if message.subject.endswith(f".{self.signals.stream}"):
            self._uncheck()
        self._sweep_soon()

    async def _sweep_loop(self, every_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sweep_now.wait(), every_s * random.uniform(0.8, 1.2))
            self._sweep_now.clear()
            if not self._activations and not self._dormitory.sleepers:
                continue
            try:
                info = await self.signals.info()
                last = int(info["state"]["last_seq"])
                before, times = self._swept_to
                if last < before or identity(info) != (self._stream_is or identity(info)):
                    self._uncheck()
                    before, times = 0, 0
                self._stream_is = identity(info)
                all_checked = all(item.mailbox.checked for item in self._activations.values())
                if last == before and times >= _SWEEPS and all_checked:
                    continue
                await self._look_for_unread(list(self._activations.values()))
                await self._look_for_sleepers(last)
                self._swept_to = (last, times + 1 if last == before else 1)
            except (BusError, FoundationError) as error:
                self.log.debug("sweep put off", error=str(error))
                await asyncio.sleep(0.2)
                self._sweep_now.set()

    async def _look_for_unread(self, activations: list[Activation]) -> None:
        by_subject = {self.subjects.mailbox(item.id): item for item in activations}
        era = self._era
        if all(item.mailbox.checked for item in activations):
            found = await self.signals.last_of(by_subject)
        else:
            info = await self.signals.info()
            newest = int(info["state"]["last_seq"])
            found = await self.signals.last_of_by_now(by_subject, newest=newest)
            for item in activations:
                if not item.mailbox.checked and has_lost_its_clock(
                    info, cursor=item.mailbox.fetched, mark=item.mailbox.fetched_mark
                ):
                    item.fall_behind()  # it looks more closely first
        for subject, activation in by_subject.items():
            self._compare(activation, found.get(subject), era)

    async def _look_for_sleepers(self, newest: int) -> None:
        sleepers = {
            self.subjects.mailbox(item.id): item for item in self._dormitory.sleepers.values()
        }
        if sleepers:
            found = await self.signals.last_of_by_now(sleepers, newest=newest)
            for subject, sleeper in sleepers.items():
                sleeper.compare(found.get(subject))

    def _compare(self, activation: Activation, last: StoredMessage | None, era: int) -> None:
        """What the last message of its mailbox says to an activation."""
        if last is not None and last.sequence > activation.mailbox.fetched:
            activation.mailbox.seen = max(activation.mailbox.seen, last.sequence)
            activation.fall_behind()
        elif last is not None and stamp(last.time) > (activation.mailbox.fetched_mark or "~"):
            activation.rewound()
        elif era == self._era and not activation.mailbox.behind:
            activation.mailbox.checked = True

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

    def append(self, subject: str, item: OutboxItem, on_ack: OnAck) -> None:
        """Publish one emitted signal; errors come by *on_ack* too."""
        if item.tried_since is None:
            item.tried_since = monotonic()
        try:
            headers = {"Nats-Msg-Id": item.msg_id, **(item.headers or {})}
            append_nowait(self.bus, subject, item.body, on_ack, headers=headers)
        except FoundationError as error:
            on_ack(error)

    def may_commit(self, activation: Activation) -> bool:
        """Take a place for a commit, or a place in the line for one.

        Few commits at a time make larger ones: while agents wait, what they
        handle joins the commit that waits.
        """
        if self.commits_in_flight >= _COMMITS_MAX:
            self._commit_line[activation] = None
            return False
        self.commits_in_flight += 1
        return True

    def commit_next(self) -> None:
        """Places are free: let those in line commit."""
        while self._commit_line and self.commits_in_flight < _COMMITS_MAX:
            activation = next(iter(self._commit_line))
            del self._commit_line[activation]
            commit(activation)

    def publish_later(
        self, activation: Activation, subject: str, item: OutboxItem, error: FoundationError
    ) -> None:
        """Try again after a while, for as long as it takes; but a full receiver is waited for
        only so long, because two agents that fill each other's mailboxes would wait for ever."""
        delay = 0.1
        if isinstance(error, MailboxFullError):
            now = monotonic()
            item.refused_since = item.refused_since or now
            if now - item.refused_since >= self._full_patience_s:
                give_up_publishing(activation, subject, error)
                return
            # It may be waiting for itself.
            activation.unchoke()
            delay = 0.5
        elif not isinstance(error, BusTimeoutError | BusUnavailableError):
            self.log.error(
                "emitted signal refused; it will be retried",
                agent=activation.id,
                subject=subject,
                error=str(error),
            )
            delay = 5.0
        if not is_repeat_remembered(monotonic() - (item.tried_since or 0.0), self._window_s):
            self._host.scope.start(self._publish_late(activation, subject, item), "publish-late")
            return
        self.publish_again_after(delay, activation, subject)

    def publish_again_after(self, delay_s: float, activation: Activation, subject: str) -> None:
        """Try the head of *subject*'s line again in about *delay_s*."""
        asyncio.get_running_loop().call_later(
            delay_s * random.uniform(0.8, 1.2), publish_head, activation, subject
        )

    async def _publish_late(self, activation: Activation, subject: str, item: OutboxItem) -> None:
        """An earlier try may have been stored so long ago that its id is forgotten: look first."""
        while activation.failure is None:
            await asyncio.sleep(0.5 * random.uniform(0.8, 1.2))
            try:
                info = await self.signals.info()
                age = timedelta(seconds=monotonic() - (item.tried_since or 0.0))
                since = parse_time(info["ts"]) - age
                found = await find_stored(self._reader_of, [item], since)
            except (BusTimeoutError, BusUnavailableError, NotFoundError):
                continue
            publish_late(activation, subject, item, item.msg_id in found)
            return

    def committed(self, activation: Activation) -> None:
        """Something of it was stored or published, or it has ended."""
        for waiter in self._commit_waiters.pop(activation, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def next_commit(self, activation: Activation) -> None:
        """Wait for the next time `committed` is called for it."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._commit_waiters.setdefault(activation, []).append(waiter)
        await waiter

    def clear_later(self, activation: Activation) -> None:
        """Drop the published outbox from the record soon, so that no recovery repeats it."""
        self._clear[activation] = monotonic() + _CLEAR_AFTER_S
        self._clear_some.set()

    async def _clear_loop(self) -> None:
        while True:
            await self._clear_some.wait()
            self._clear_some.clear()
            await asyncio.sleep(_CLEAR_AFTER_S)
            now = monotonic()
            for activation, due in list(self._clear.items()):
                if due > now:
                    self._clear_some.set()
                    continue
                del self._clear[activation]
                if (
                    activation.outbox.committed
                    and not activation.outbox
                    and activation.in_flight is None
                    and activation.failure is None
                    and self._activations.get(activation.id) is activation
                ):
                    activation.dirty = True
                    commit(activation)

    def resolve(self, activation: Activation) -> None:
        """Find out what became of the commit in flight."""
        if activation not in self._resolving:
            self._resolving.add(activation)
            self._host.scope.start(self._resolve(activation), "resolve")

    async def _resolve(self, activation: Activation) -> None:
        delay = 0.02
        try:
            while activation.in_flight is not None and activation.failure is None:
                entry = await self._read_surely(activation.id)
                verdict = self._judge(activation, entry)
                if verdict == "stored":
                    assert entry is not None
                    stored_as(activation, entry.revision)
                    return
                if verdict == "again":
                    self._resolving.discard(activation)
                    await asyncio.sleep(delay * random.uniform(0.5, 1.5))
                    store(activation)
                    return
                activation.fail(
                    FencedError(f"{activation.id} is run by a newer activation.")
                    if verdict == "fenced"
                    else StateInvalidError(
                        f"The record of {activation.id} was changed or deleted by someone else."
                    )
                )
        except StateInvalidError as error:
            activation.fail(error)
        finally:
            self._resolving.discard(activation)

    def _judge(self, activation: Activation, entry: Entry | None) -> str:
        """Stored, again, fenced or foreign: what the stored record says about our commit."""
        if entry is None or entry.value is None:
            return "again" if activation.revision == 0 else "foreign"
        if entry.revision == activation.revision:
            return "again"
        found = decode_record(activation.id, entry.value)
        if planted("skip_epoch_check") and found.writer.worker != self._host.worker:
            activation.revision = entry.revision
            return "again"
        if found.epoch > activation.epoch:
            return "fenced"
        mine = found.epoch == activation.epoch and found.writer.worker == self._host.worker
        if mine and found.writer.incarnation == self._host.incarnation:
            return "stored" if found.commit == activation.commit_no else "foreign"
        return "fenced"

    # ---- ends -------------------------------------------------------------------

    def revive(self, record: AgentRecord, cls: type[Agent], entry: Entry) -> Activation:
        """An activation that goes on from *entry* under the epoch that it has: nothing is claimed.

        Raises:
            FencedError, StateInvalidError, ConfigError
        """
        activation, _ = self._prepare(record, cls, entry)
        activation.revision = entry.revision
        self._activations[record.id] = activation
        if activation.outbox:
            self._host.scope.start(self._recover_outbox(activation), "recover-outbox")
        return activation

    def lay_down(self, activation: Activation) -> None:
        """It sleeps from now on; its fingerprint stays, because it is still here."""
        del self._activations[activation.id]
        self._parked.discard(activation)
        self._clear.pop(activation, None)
        self._moved.add(activation)
        self.committed(activation)
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
        self._clear.pop(activation, None)
        self._commit_line.pop(activation, None)
        self.attempts.pop(activation.id, None)
        self._moved.add(activation)
        activation.agent.ctx._home = None
        if activation.stopped is not None and not activation.stopped.done():
            activation.stopped.set_result(None)
        self.committed(activation)
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


def _is_durable(record: AgentRecord, cls: type[Agent]) -> bool:
    return record.spec.durable and cls.durable


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
