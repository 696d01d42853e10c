"""What operators want of nodes, fed by a watch of the bucket ``settings``: cordons, drains, the last rebalance.

IO: one watch, and compare-and-set writes. A cordon outlives the node's process,
because it belongs to the node's name; `marked` merges it into a node's view, so
that whoever places agents knows of it. Unknown keys of the bucket are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry, Watch
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.view import NodeView
from foundation_nats.errors import ConflictError, DecodeError, StaleRevisionError
from foundation_schemas import Cordon, RebalanceRecord

CORDON = "cordon."
REBALANCE = "rebalance"
_ATTEMPTS = 5

Changed = Callable[[], None]


class Upkeep:
    """Cordons and rebalance as one process sees them."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bucket = Bucket(bus, subjects, "settings")
        self._cordons: dict[str, Cordon] = {}
        self._rebalance: RebalanceRecord | None = None
        self._revisions: dict[str, int] = {}
        self._listeners: list[Changed] = []
        self._watch: Watch | None = None
        self._log = get_logger("upkeep")

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Read everything there is, then follow changes until *scope* closes.

        Raises:
            BusTimeoutError: the bucket could not be read in time.
        """
        self._watch = self._bucket.watch(scope, self._on_entry)
        await self._watch.wait_ready(timeout)

    async def refresh(self) -> None:
        """Read everything once more; for a new leader before it decides, and for one-off readers.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        before = dict(self._revisions)
        entries = await self._bucket.read_all()
        for entry in entries.values():
            self._on_entry(entry)
        for key, revision in before.items():
            if key not in entries and self._revisions.get(key) == revision:
                self._on_entry(Entry(key, None, revision + 1))
                self._revisions[key] = revision  # its marker may yet come by the watch

    # ---- reading ----------------------------------------------------------------

    @property
    def cordons(self) -> Mapping[str, Cordon]:
        """Node to its cordon."""
        return self._cordons

    @property
    def rebalance(self) -> RebalanceRecord | None:
        """The last rebalance, finished or not."""
        return self._rebalance

    def subscribe(self, listener: Changed) -> None:
        """Call *listener* after every change, own writes included."""
        self._listeners.append(listener)

    def marked(self, view: NodeView) -> NodeView:
        """The view of a node as operators want it."""
        cordon = self._cordons.get(view.name)
        if cordon is None or view.record.cordoned:
            return view
        update = {"cordoned": True, "cordon_reason": cordon.reason}
        return replace(view, record=view.record.model_copy(update=update))

    def _on_entry(self, entry: Entry) -> None:
        if entry.revision <= self._revisions.get(entry.key, 0):
            return
        try:
            if entry.key.startswith(CORDON):
                node = entry.key.removeprefix(CORDON)
                if entry.value is None:
                    self._cordons.pop(node, None)
                else:
                    self._cordons[node] = decode(Cordon, entry.value)
            elif entry.key == REBALANCE:
                found = entry.value
                self._rebalance = None if found is None else decode(RebalanceRecord, found)
            else:
                return
        except DecodeError as error:
            self._log.error("setting not understood, left alone", key=entry.key, error=str(error))
            return
        self._revisions[entry.key] = entry.revision
        for listener in self._listeners:
            listener()

    # ---- changing ---------------------------------------------------------------

    async def set_cordon(
        self, node: str, change: Callable[[Cordon | None], Cordon | None]
    ) -> Cordon | None:
        """Replace a node's cordon by what *change* makes of it; None: there is none any more.

        Raises:
            ConflictError: somebody else keeps changing it.
            BusUnavailableError, BusTimeoutError
        """
        key = CORDON + node
        for _ in range(_ATTEMPTS):
            entry = await self._bucket.read(key)
            before = None
            if entry is not None and entry.value is not None:
                before = decode(Cordon, entry.value)
            after = change(before)
            if after == before:
                return after
            expected = 0 if entry is None else entry.revision
            try:
                if after is None:
                    await self._bucket.delete(key, expected=expected)
                    await self._reread(key)
                else:
                    value = encode(after)
                    revision = await self._bucket.replace(key, value, expected=expected)
                    self._on_entry(Entry(key, value, revision))
            except StaleRevisionError:
                continue
            return after
        raise ConflictError(f"The cordon of {node} is being changed by others.", hint="Try again.")

    async def _reread(self, key: str) -> None:
        entry = await self._bucket.read(key)
        if entry is not None:
            self._on_entry(entry)

    async def begin_rebalance(self, wanted: RebalanceRecord) -> None:
        """Write a rebalance down, for the leader to carry out.

        Raises:
            ConflictError: another one is under way.
            BusUnavailableError, BusTimeoutError
        """
        for _ in range(_ATTEMPTS):
            entry = await self._bucket.read(REBALANCE)
            if entry is not None and entry.value is not None:
                known = decode(RebalanceRecord, entry.value)
                if known.id == wanted.id:
                    return
                if known.finished_at is None:
                    raise ConflictError(
                        f"A rebalance is under way since {known.at} (by {known.by}).",
                        hint="Wait until it has ended; `foundation events --topic cluster`.",
                    )
            expected = 0 if entry is None else entry.revision
            try:
                value = encode(wanted)
                revision = await self._bucket.replace(REBALANCE, value, expected=expected)
            except StaleRevisionError:
                continue
            self._on_entry(Entry(REBALANCE, value, revision))
            return
        raise ConflictError("Another rebalance is being started.", hint="Try again.")

    async def finish_rebalance(self, finished: RebalanceRecord) -> bool:
        """Write its result; False: it is not the present one any more, or finished already.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        entry = await self._bucket.read(REBALANCE)
        if entry is None or entry.value is None:
            return False
        known = decode(RebalanceRecord, entry.value)
        if known.id != finished.id or known.finished_at is not None:
            self._on_entry(entry)
            return False
        value = encode(finished)
        try:
            revision = await self._bucket.replace(REBALANCE, value, expected=entry.revision)
        except StaleRevisionError:
            return False
        self._on_entry(Entry(REBALANCE, value, revision))
        return True
