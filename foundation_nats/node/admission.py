"""The node as arbiter of its own capacity: agents start once the ledger says that they have their share.

IO: one key, by compare-and-set, one write for all that has gathered. The ledger
says at any time at least what this node's agents take: it is written before an
agent is started, and after one has stopped. Agents that need nothing the node
declares cost nothing here: they are never asked about.

What is wanted is local and whole (who has a share, who asks, who left), so that
a write whose answer was lost is simply done again, and a ledger that went back
with its store or was deleted is put right: after each reconnect, and every few
seconds. A ledger that names a later life of this node is another process's: it is
left alone and nobody is admitted, unless the node's own record says that this life
is the present one (a clock that was ahead once had numbered the other).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.ledger import Entry, admit, limited, live, minus, opened, plus
from foundation_nats.cluster.ledgers import Ledgers, Read
from foundation_nats.errors import FoundationError, StaleRevisionError
from foundation_schemas import LedgerRecord, NodeRecord

_RETRY_S = 0.2
_CHECK_EVERY_S = 5.0


@dataclass(slots=True)
class _Share:
    """What an agent was given, and what it asked for."""

    needs: Mapping[str, float]
    share: dict[str, float]


class Admission:
    """The shares of one node's agents."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        node: str,
        capacity: Mapping[str, float],
        on_admitted: Callable[[list[str]], None],
        on_refused: Callable[[dict[str, str]], None],
        on_dropped: Callable[[list[str]], None] = lambda _: None,
        check_every_s: float = _CHECK_EVERY_S,
    ) -> None:
        """*on_refused* is told why, per agent; *on_dropped* which reservations have no room any more."""
        self._ledgers = Ledgers(bus, subjects)
        self._nodes = Bucket(bus, subjects, "nodes")
        self._node = node
        self._capacity = dict(capacity)
        self._on_admitted = on_admitted
        self._on_refused = on_refused
        self._on_dropped = on_dropped
        self._check_every_s = check_every_s
        self._incarnation = 0
        self._shares: dict[str, _Share] = {}
        self._sum: dict[str, float] = {}
        self._asking: dict[str, Entry] = {}
        self._left: set[str] = set()
        """Those that stopped and whose share is still counted."""
        self._known: Read | None = None
        self._wake = asyncio.Event()
        self._writes = 0
        self._log = get_logger("admission").bind(node=node)
        bus.on_reconnect(self._distrust)

    def open(self, scope: TaskScope, incarnation: int) -> None:
        """Open the books of this life, and begin to admit."""
        self.begin(incarnation)
        scope.start(self._run(), "admission")

    def begin(self, incarnation: int) -> None:
        """A new life: nobody has a share any more."""
        self._incarnation = incarnation
        self._shares.clear()
        self._sum = {}
        self._asking.clear()
        self._left.clear()
        self._distrust()

    def _distrust(self) -> None:
        """Read before the next write: the store may have gone back meanwhile."""
        self._known = None
        self._wake.set()

    @property
    def writes(self) -> int:
        """How often the ledger was written, for tests."""
        return self._writes

    # ---- asking -------------------------------------------------------------------

    def may_start(self, agent: str, needs: Mapping[str, float], reservation: str | None) -> bool:
        """Whether it needs no share or has it; if not, it is asked for, and told about later."""
        known = self._shares.get(agent)
        if known is not None and known.needs == needs:
            self._left.discard(agent)
            return True
        if known is None and not limited(needs, self._capacity):
            self._asking.pop(agent, None)
            return True
        self._asking[agent] = Entry(agent, dict(needs), reservation)
        self._wake.set()
        return False

    def leave(self, agent: str) -> None:
        """It has stopped here, or will not start."""
        self._asking.pop(agent, None)
        if agent in self._shares:
            self._left.add(agent)
            self._wake.set()

    # ---- writing ------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), self._check_every_s)
            except TimeoutError:
                self._known = None
            self._wake.clear()
            try:
                await self._settle()
            except StaleRevisionError:
                self._known = None
                self._wake.set()
            except FoundationError as error:
                self._log.info("the ledger will be written later", error=str(error))
                self._known = None
                await asyncio.sleep(_RETRY_S)
                self._wake.set()

    def _give_back(self, agent: str) -> None:
        share = self._shares.pop(agent, None)
        if share is not None:
            self._sum = minus(self._sum, share.share) if self._shares else {}

    async def _settle(self) -> None:
        incarnation = self._incarnation
        left, self._left = self._left, set()
        for agent in left:
            self._give_back(agent)
        wanted = list(self._asking.values())
        for entry in wanted:
            self._give_back(entry.agent)  # its needs have changed
        now = await self._ledgers.clock.now()
        read = self._known
        if read is None:
            read = await self._ledgers.read(self._node)
        if incarnation != self._incarnation:
            return
        before = read.record
        if before is not None and before.incarnation > incarnation:
            if not await self._is_present(incarnation):
                self._log.warning(
                    "the ledger is of a later life of this node", incarnation=before.incarnation
                )
                return
            if incarnation != self._incarnation:
                return
        ledger = opened(before, self._node, incarnation, self._capacity, now)
        after, refused = admit(ledger, self._sum, wanted, now)
        if refused and self._known is not None:
            # What was known may be old: others release without asking us.
            self._distrust()
            return
        if after != before:
            after_read = await self._ledgers.write(after, read)
            self._writes += 1
            self._tell_dropped(before, after, wanted, now)
            if incarnation != self._incarnation:
                return
            read = after_read
        self._known = read
        self._answer(wanted, refused)

    async def _is_present(self, incarnation: int) -> bool:
        """Whether the node's record names this life; a later one is written before its books."""
        entry = await self._nodes.read(self._node)
        if entry is None or entry.value is None:
            return False
        return decode(NodeRecord, entry.value).incarnation == incarnation

    def _tell_dropped(
        self, before: LedgerRecord | None, after: LedgerRecord, wanted: list[Entry], now: float
    ) -> None:
        if before is None or not before.reservations:
            return
        left = {item.id for item in after.reservations} | {entry.reservation for entry in wanted}
        if dropped := [item.id for item in live(before, now) if item.id not in left]:
            self._on_dropped(dropped)

    def _answer(self, wanted: list[Entry], refused: dict[str, str]) -> None:
        admitted: list[str] = []
        for entry in wanted:
            agent = entry.agent
            asked = self._asking.get(agent)
            if agent in refused:
                if asked is not entry:
                    refused.pop(agent)  # it left, or asks for something else by now
                else:
                    del self._asking[agent]
                continue
            share = limited(entry.needs, self._capacity)
            self._shares[agent] = _Share(entry.needs, share)
            self._sum = plus(self._sum, share)
            if asked is None:
                self._left.add(agent)
                self._wake.set()
            elif asked.needs == entry.needs:
                del self._asking[agent]
                admitted.append(agent)
            # Else it asks for something else by now, and gives this back then.
        if admitted:
            self._on_admitted(admitted)
        if refused:
            self._on_refused(refused)
