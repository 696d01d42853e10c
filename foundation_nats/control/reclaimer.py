"""The leader's broom for the ledgers: drops reservations whose time is over, and the books of nodes that are gone.

IO. Reservations don't count from the moment they expire, whoever looks; dropping
them is what changes a ledger, and that wakes the reconciler, so that pending
agents get the room. Whoever dropped them, the leader tells of it. A node that
nobody knows any more (it left, or its record has expired) takes its books along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.cluster.ledger import expire, next_expiry
from foundation_nats.cluster.ledgers import Ledgers
from foundation_nats.errors import FoundationError
from foundation_schemas import LedgerRecord

_EVERY_S = 0.5
_FORGET_AFTER_S = 60.0
"""A node of which nothing is known for so long is gone: one that rejoins is back sooner."""


class Reclaimer:
    """The leader's loop over the ledgers."""

    def __init__(
        self,
        ledgers: Ledgers,
        known: Callable[[], Collection[str]],
        emit: Callable[..., None],
        *,
        forget_after_s: float = _FORGET_AFTER_S,
    ) -> None:
        """*known* gives the names of the nodes, dead or alive."""
        self._ledgers = ledgers
        self._known = known
        self._emit = emit
        self._forget_after_s = forget_after_s
        self._term: int | None = None
        self._unknown: dict[str, float] = {}
        """Node to since when nobody knows it."""
        self._log = get_logger("reclaimer")
        ledgers.subscribe(self._on_ledger)

    def lead(self, term: int | None) -> None:
        """Work in this term; None: stop."""
        self._term = term
        self._unknown.clear()

    async def run(self) -> None:
        """Look now and then, for ever; asks nobody while there is nothing to do."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._term is None:
                continue
            try:
                await self._expire()
                await self._forget()
            except FoundationError as error:
                self._log.info("reservations will be reclaimed later", error=str(error))

    async def _expire(self) -> None:
        ending = {
            node: due
            for node, book in self._ledgers.seen().items()
            if (due := next_expiry(book)) is not None
        }
        if not ending:
            return
        now = await self._ledgers.clock.now()
        for node, due in ending.items():
            if now >= due and self._term is not None:
                await self._ledgers.change(node, expire)

    async def _forget(self) -> None:
        known, now = self._known(), monotonic()
        strange = [node for node in self._ledgers.seen() if node not in known]
        self._unknown = {node: self._unknown.get(node, now) for node in strange}
        for node, since in list(self._unknown.items()):
            if now - since < self._forget_after_s or self._term is None:
                continue
            read = await self._ledgers.read(node)
            if read.record is not None and node not in self._known():
                # Should it live after all, it opens its books anew.
                await self._ledgers.remove(read)
                self._log.info("the ledger of a node that is gone is deleted", node=node)
            del self._unknown[node]

    def _on_ledger(
        self, node: str, before: LedgerRecord | None, after: LedgerRecord | None
    ) -> None:
        now = self._ledgers.clock.at()
        if self._term is None or before is None or not before.reservations or now is None:
            return
        left = set() if after is None else {item.id for item in after.reservations}
        expired = [
            item
            for item in before.reservations
            if item.id not in left and item.expires_at is not None and item.expires_at <= now
        ]
        if expired:
            self._emit(
                "resources",
                "reclaimed",
                f"{len(expired)} reservation(s) on {node} expired and were reclaimed.",
                node=node,
                reservations=[item.id for item in expired],
                holders=sorted({item.holder for item in expired if item.holder}),
            )
