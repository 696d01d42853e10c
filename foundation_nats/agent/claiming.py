"""`Claims`: how a worker makes agents its own.

To claim: read the records, refuse those of a newer epoch, and rewrite each with this epoch by
compare-and-set, which fences every older activation. What comes of it is an activation that
goes on from what was stored, and is not begun yet.

A record that fails to decode, is of an unknown schema or is too large ends the claim: the
agent is reported as failed, and nothing is overwritten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from secrets import token_hex

import orjson

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.agent import Agent
from foundation_nats.agent.commits import read_surely
from foundation_nats.agent.committing import LedgerKeeper
from foundation_nats.agent.context import Context
from foundation_nats.agent.guards import Guards
from foundation_nats.agent.kin import WishingNursery, join
from foundation_nats.agent.loading import load_class
from foundation_nats.agent.offload import Offload
from foundation_nats.agent.past import Past
from foundation_nats.agent.record import OutboxItem, decode_record, encode_record
from foundation_nats.agent.state import dump_state, first_state, load_state
from foundation_nats.agent.steps import StepLedger
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.base.logs import Logger
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.streams import PubAck
from foundation_nats.consensus.replicas import Replicas
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    FencedError,
    FoundationError,
    NotFoundError,
    PayloadTooLargeError,
    StaleRevisionError,
    StateInvalidError,
)
from foundation_nats.node.blackbox import STARTING
from foundation_nats.node.hosting import HostContext
from foundation_schemas import AgentRecord, AgentStatus, StateRecord

_CLAIM_ROUNDS = 8


class Claims:
    """The claims of one worker.

    Args:
        activate: makes an activation of this worker.
        attempts: agent to (sequence, tries) of a signal that has ended its worker; added to.
        report: tells the node what became of an agent.
    """

    def __init__(
        self,
        host: HostContext,
        state: Bucket,
        *,
        activate: Callable[..., Activation],
        attempts: dict[str, tuple[int, int]],
        report: Callable[[str, int, AgentStatus, str | None], None],
        writer_json: bytes,
        replicas: Replicas,
        guards: Guards,
        offload: Offload,
        nursery: WishingNursery,
        log: Logger,
    ) -> None:
        self._host = host
        self._state = state
        self._activate = activate
        self._attempts = attempts
        self._report = report
        self._writer_json = writer_json
        self._replicas = replicas
        self._guards = guards
        self._offload = offload
        self._nursery = nursery
        self._log = log
        self._history = host.config.mailbox.history
        self._history_max = host.config.mailbox.mailbox_max // 4
        self._steps_max_bytes = host.config.mailbox.steps_max_bytes

    async def claim(self, records: list[AgentRecord]) -> list[Activation]:
        """Claim these agents; what can't be claimed is reported, or is another's by now."""
        classes: dict[str, type[Agent] | ConfigError] = {}
        ready = []
        for record in records:
            run = record.spec.run
            if run not in classes:
                try:
                    # Should the import end the process, its agent is to blame.
                    classes[run] = self._host.blackbox.call(
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
                entries = await self._state.read_many(durable)
                break
            except (BusTimeoutError, BusUnavailableError) as error:
                if await self._is_bucket_gone():
                    for record, cls in ready:
                        if _is_durable(record, cls):
                            reason = f"the server has no stream {self._state.stream}"
                            self._report(record.id, record.epoch, AgentStatus.FAILED, reason)
                    ready = [(record, cls) for record, cls in ready if not _is_durable(record, cls)]
                    entries = {}
                    break
                self._log.warning("records not readable yet", error=str(error))
                await asyncio.sleep(0.2)
        claims = [self._claim(record, cls, entries.get(record.id)) for record, cls in ready]
        return [item for item in await asyncio.gather(*claims) if item is not None]

    async def _is_bucket_gone(self) -> bool:
        try:
            await self._state.reader.info()
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
                activation, payload = self.prepare(record, cls, entry)
                activation.outbox.recovered_at = activation.outbox.recovered_at or recovered_at
                if payload is not None:
                    await self._write_claim(activation, payload)
                return activation
            except FencedError:
                self._log.info("claim refused: a newer activation exists", agent=record.id)
                return None
            except (StateInvalidError, PayloadTooLargeError, ConfigError) as error:
                self._report(record.id, record.epoch, AgentStatus.FAILED, str(error))
                return None
            except (StaleRevisionError, BusTimeoutError, BusUnavailableError):
                try:
                    entry = await read_surely(self._host.bus, self._state, record.id)
                except StateInvalidError as error:
                    self._report(record.id, record.epoch, AgentStatus.FAILED, str(error))
                    return None
                if entry is not None and self._is_my_claim(record, entry):
                    activation, _ = self.prepare(record, cls, entry)
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

    def prepare(
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
            record.id, config=record.spec.config or None, node=self._host.node, epoch=record.epoch
        )
        agent.ctx._agent = agent
        agent.ctx._consensus = self._replicas
        agent.ctx._guards = self._guards
        agent.ctx._offload = self._offload
        agent.ctx.bus, agent.ctx.subjects = self._host.bus, self._host.subjects
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
        activation = self._activate(
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
            steps=StepLedger(stored.steps, bytes_max=self._steps_max_bytes)
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
            self._attempts[record.id] = (attempt[0], attempt[1])
        activation.cautious = attempt is not None
        if not agent.durable:
            return activation, None
        payload = encode_record(
            epoch=record.epoch,
            commit=activation.commit_no,
            writer=self._writer_json,
            cursor=activation.mailbox.cursor,
            mark=activation.mailbox.mark,
            run=record.spec.run,
            state=activation.state_json,
            salt=activation.salt,
            emitted=activation.emitted,
            outbox=outbox,
            attempt=self._attempts.get(record.id) if attempt is not None else None,
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
        await self._host.bus.wait_room()
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_ack(ack: PubAck | FoundationError) -> None:
            if done.done():
                return
            if isinstance(ack, PubAck):
                done.set_result(ack.sequence)
            else:
                done.set_exception(ack)

        self._state.replace_nowait(
            activation.id, payload, expected=activation.revision, on_ack=on_ack
        )
        activation.revision = await done


def _is_durable(record: AgentRecord, cls: type[Agent]) -> bool:
    return record.spec.durable and cls.durable
