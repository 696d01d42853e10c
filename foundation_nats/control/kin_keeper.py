"""Carries out what `kinship.decide` says about children, while this node leads.

IO: writes wishes by compare-and-set, and signals into mailboxes, under ids that are the same whoever
sends them. What fails is decided anew at the next look. A signal that is repeated later than the stream
remembers ids (a leader died between a signal and the write after it, and no other led for two
minutes) is recognised by its receiver, who knows its own children (`agent/family.py`).

Apart from the reconciler's loop: whoever waits for a full mailbox here must not delay a failover.
"""

from __future__ import annotations

import asyncio

from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.events import Events
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.control.desired import Desired
from foundation_nats.control.kinship import Bury, End, Step, TellOrphan, decide, kin_id
from foundation_nats.control.planner import History
from foundation_nats.errors import FoundationError
from foundation_nats.signaling.envelope import encode_envelope
from foundation_schemas import Deployment, Ending, ParentLink

_DEBOUNCE_S = 0.01
_LOOK_EVERY_S = 5.0
_RETRY_S = 0.5
_SIDE_BY_SIDE = 64
_SOURCE = "cluster"


class KinKeeper:
    """The leader's loop about children."""

    def __init__(
        self, bus: Bus, subjects: Subjects, registry: Registry, desired: Desired, node: str
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._registry = registry
        self._desired = desired
        self._events = Events(bus, subjects, node)
        self._term: int | None = None
        self._is_ready = False
        self._wake = asyncio.Event()
        self._digests = History()
        self._children: set[str] = set()
        """Names of the wishes that have a parent."""
        self._log = get_logger("kin")

    def open(self, scope: TaskScope) -> None:
        """Follow wishes and records, and work while `lead` says so, until *scope* closes."""
        for name in self._desired.all():
            self._on_wish(name)
        self._desired.subscribe(self._on_wish)
        self._registry.subscribe(self._on_record)
        scope.start(self._run(), "kin")

    def lead(self, term: int | None) -> None:
        """Work in this term; None: stop."""
        self._term = term
        self._is_ready = False
        self._wake.set()

    def _on_wish(self, name: str) -> None:
        wish = self._desired.get(name)
        if wish is not None and wish.spec.parent is not None:
            self._children.add(name)
        else:
            self._children.discard(name)
        if self._children and self._term is not None:
            self._wake.set()

    def _on_record(self, _agent: str, _held: Held | None) -> None:
        if self._children and self._term is not None:
            self._wake.set()

    async def _run(self) -> None:
        wait = _LOOK_EVERY_S
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
                await asyncio.sleep(_DEBOUNCE_S)
            except TimeoutError:
                pass
            self._wake.clear()
            wait = _LOOK_EVERY_S
            if self._term is None:
                continue
            try:
                if not self._is_ready:
                    # Wishes and records come by two watches: a parent's wish must not be missed.
                    await self._desired.refresh()
                    self._is_ready = True
                if not await self._look():
                    wait = _RETRY_S
            except FoundationError as error:
                self._log.info("children looked at later", error=str(error))
                wait = _RETRY_S

    async def _look(self) -> bool:
        """One pass; whether all of it could be done."""
        if not self._children:
            return True
        steps = decide(
            self._desired.all(), self._registry.all(), self._digests.digest, sorted(self._children)
        )
        gate = asyncio.Semaphore(_SIDE_BY_SIDE)
        term = self._term

        async def carry_out(step: Step) -> bool:
            async with gate:
                if self._term != term:
                    return True
                try:
                    await self._carry_out(step)
                except FoundationError as error:
                    self._log.info("put off", child=step.child, error=str(error))
                    return False
                return True

        return all(await asyncio.gather(*map(carry_out, steps)))

    async def _carry_out(self, step: Step) -> None:
        wish = self._desired.get(step.child)
        link = None if wish is None else wish.spec.parent
        if wish is None or link is None:
            return
        match step:
            case End():
                await self._end(wish, link, step.ending)
            case TellOrphan():
                await self._tell_orphan(wish, link, step.reason)
            case Bury():
                await self._bury(wish, link, step.ending)

    async def _end(self, wish: Deployment, link: ParentLink, ending: Ending) -> None:
        def ended(current: Deployment) -> Deployment:
            if current.ending is not None or current.spec.parent != link:
                return current
            return current.model_copy(update={"ending": ending})

        await self._desired.change(wish.name, ended)
        self._events.emit(
            "agent",
            "child_ended",
            f"{wish.name}, {link.tag} of {link.id}, has {ending.status}"
            + (f": {ending.reason}." if ending.reason else "."),
            agent=wish.name,
            parent=link.id,
            tag=link.tag,
            status=ending.status,
            reason=ending.reason,
        )

    async def _tell_orphan(self, wish: Deployment, link: ParentLink, reason: str) -> None:
        await self._send(
            wish.name,
            "foundation.orphaned",
            {"parent": link.id, "tag": link.tag, "reason": reason, "order": link.order},
            kin_id("orphaned", wish.name, link.id, link.order),
        )
        failpoint("kin.after_signal")

        def told(current: Deployment) -> Deployment:
            if current.spec.parent != link:
                return current
            return current.model_copy(update={"orphaned": True})

        await self._desired.change(wish.name, told)
        self._events.emit(
            "agent",
            "orphaned",
            f"{wish.name} goes on without its parent {link.id}, which {reason}.",
            agent=wish.name,
            parent=link.id,
            reason=reason,
        )

    async def _bury(self, wish: Deployment, link: ParentLink, ending: Ending) -> None:
        await self._send(
            link.id,
            "foundation.child.exited",
            {
                "id": wish.name,
                "tag": link.tag,
                "order": link.order,
                "status": ending.status,
                "reason": ending.reason,
            },
            kin_id("exited", wish.name, link.id, link.order),
        )
        failpoint("kin.after_signal")
        await self._desired.withdraw(wish)

    async def _send(self, agent: str, type: str, data: dict[str, object], id: str) -> None:
        body = encode_envelope(id=id, source=_SOURCE, type=type, target=f"agent:{agent}", data=data)
        await append(self._bus, self._subjects.mailbox(agent), body, headers={"Nats-Msg-Id": id})
