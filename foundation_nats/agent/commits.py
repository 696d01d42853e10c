"""`Commits`: of all agents of a worker: how many at a time, who waits for one, what became of one.

Few commits at a time make larger ones: while agents wait for a place, what they handle
joins the commit that waits.

After a commit whose outcome is unknown the record is read from the leader, however long
that takes, and its writer compared. It says that the commit is stored, that it must be sent
again, or that the activation is over: run by a newer one, or changed by somebody else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.committing import commit, store, stored_as
from foundation_nats.agent.record import decode_record
from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import planted
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    FencedError,
    NotFoundError,
    StateInvalidError,
)

_COMMITS_MAX = 32
_CLEAR_AFTER_S = 0.5
_BUCKET_PATIENCE_S = 1.0
"""How long the state bucket may be missing before that counts."""


class Commits:
    """The commits of one worker.

    Args:
        holds: whether an activation is still one of the worker's.
    """

    def __init__(
        self,
        bus: Bus,
        state: Bucket,
        scope: TaskScope,
        *,
        worker: str,
        incarnation: int,
        holds: Callable[[Activation], bool],
    ) -> None:
        self._bus = bus
        self._state = state
        self._scope = scope
        self._worker = worker
        self._incarnation = incarnation
        self._holds = holds
        self._line: dict[Activation, None] = {}
        self._clear: dict[Activation, float] = {}
        self._clear_some = asyncio.Event()
        self._waiters: dict[Activation, list[asyncio.Future[None]]] = {}
        self._resolving: set[Activation] = set()
        self.in_flight = 0
        """Sent and not yet answered."""
        scope.start(self._clear_loop(), "clear")

    def forget(self, activation: Activation) -> None:
        """It has ended, or sleeps: nothing more of it is to be stored."""
        self._clear.pop(activation, None)
        self._line.pop(activation, None)
        self.committed(activation)

    def resume(self) -> None:
        """Streams may answer again: go on with those whose commit has an unknown outcome."""
        for activation in list(self._resolving):
            activation.resume()

    def may_commit(self, activation: Activation) -> bool:
        """Take a place for a commit, or a place in the line for one.

        Few commits at a time make larger ones: while agents wait, what they
        handle joins the commit that waits.
        """
        if self.in_flight >= _COMMITS_MAX:
            self._line[activation] = None
            return False
        self.in_flight += 1
        return True

    def commit_next(self) -> None:
        """Places are free: let those in line commit."""
        while self._line and self.in_flight < _COMMITS_MAX:
            activation = next(iter(self._line))
            del self._line[activation]
            commit(activation)

    def committed(self, activation: Activation) -> None:
        """Something of it was stored or published, or it has ended."""
        for waiter in self._waiters.pop(activation, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def next_commit(self, activation: Activation) -> None:
        """Wait for the next time `committed` is called for it."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(activation, []).append(waiter)
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
                    and self._holds(activation)
                ):
                    activation.dirty = True
                    commit(activation)

    def resolve(self, activation: Activation) -> None:
        """Find out what became of the commit in flight."""
        if activation not in self._resolving:
            self._resolving.add(activation)
            self._scope.start(self._resolve(activation), "resolve")

    async def _resolve(self, activation: Activation) -> None:
        delay = 0.02
        try:
            while activation.in_flight is not None and activation.failure is None:
                entry = await read_surely(self._bus, self._state, activation.id)
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
        if planted("skip_epoch_check") and found.writer.worker != self._worker:
            activation.revision = entry.revision
            return "again"
        if found.epoch > activation.epoch:
            return "fenced"
        mine = found.epoch == activation.epoch and found.writer.worker == self._worker
        if mine and found.writer.incarnation == self._incarnation:
            return "stored" if found.commit == activation.commit_no else "foreign"
        return "fenced"


async def read_surely(bus: Bus, state: Bucket, agent: str) -> Entry | None:
    """The record from the leader, however long that takes.

    Raises:
        StateInvalidError: the state bucket is gone.
    """
    delay = 0.02
    missing_since: float | None = None
    while True:
        try:
            await bus.wait_connected(60.0)
            return await state.read(agent)
        except (BusTimeoutError, BusUnavailableError):
            pass
        except NotFoundError as error:
            missing_since = missing_since or monotonic()
            if monotonic() - missing_since > _BUCKET_PATIENCE_S:
                raise StateInvalidError(
                    f"The state of {agent} can't be stored: the server has no stream "
                    f"{state.stream}.",
                    hint="Restore it from a backup, or see `foundation doctor`.",
                ) from error
        await asyncio.sleep(delay)
        delay = min(delay * 2, 1.0)
