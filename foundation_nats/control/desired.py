"""What people asked for: a watch-fed view of the ``desired`` bucket, and changes to it.

One key per deployment; every write is a compare-and-set on the revision that
was read, and is decided anew when somebody else was first. That there is
nothing to write, because all is as it is wished or nothing is there to change, is
said only after a look at the bucket: the view may be late. Applying several
deployments is not atomic: what was written before an error stays written, and
applying the same wishes again completes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from foundation_nats.base.clock import utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry, Watch
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.streams import PubAck
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.events import Events
from foundation_nats.control.collision import find_collision
from foundation_nats.control.diff import ChangeKind, DeploymentChange, diff, taken_over
from foundation_nats.control.rollouts import adopted, succeeding, with_replicas_kept
from foundation_nats.errors import (
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    DecodeError,
    DeploymentNotFoundError,
    FoundationError,
    StaleRevisionError,
)
from foundation_nats.placement.strategies import check_strategy
from foundation_schemas import Deployment, Ending

_ATTEMPTS = 5
_GONE_MAX = 1_000


@dataclass(frozen=True, slots=True)
class _Known:
    deployment: Deployment
    revision: int


class Desired:
    """The wishes as one process sees them."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self.bucket = Bucket(bus, subjects, "desired")
        self._events = Events(bus, subjects, bus.name)
        self._known: dict[str, _Known] = {}
        self._wishes: dict[str, Deployment] = {}
        self._gone: dict[str, int] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._watch: Watch | None = None
        self._log = get_logger("desired")

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Read everything there is, then follow changes until *scope* closes.

        Raises:
            BusTimeoutError: the bucket could not be read in time.
        """
        self._watch = self.bucket.watch(scope, self._on_entry)
        await self._watch.wait_ready(timeout)

    async def refresh(self) -> None:
        """Read everything once more, besides the watch; for a new leader before it decides.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        for entry in (await self.bucket.read_all()).values():
            self._on_entry(entry)

    # ---- reading ----------------------------------------------------------------

    def all(self) -> Mapping[str, Deployment]:
        """Every deployment by name, live: it changes under your hands across awaits."""
        return self._wishes

    def get(self, name: str) -> Deployment | None:
        """The deployment of this name; None if there is none."""
        return self._wishes.get(name)

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """Call *callback* with the name after every change, own writes included."""
        self._listeners.append(callback)

    def _on_entry(self, entry: Entry) -> None:
        if entry.value is None:
            self._apply(entry.key, None, entry.revision)
            return
        try:
            deployment = decode(Deployment, entry.value)
        except DecodeError as error:
            self._log.error(
                "deployment not understood, left alone", name=entry.key, error=str(error)
            )
            return
        self._apply(entry.key, deployment, entry.revision)

    def _apply(self, name: str, deployment: Deployment | None, revision: int) -> None:
        known = self._known.get(name)
        newest = known.revision if known is not None else self._gone.get(name, 0)
        if revision <= newest:
            return
        if deployment is None:
            self._known.pop(name, None)
            self._wishes.pop(name, None)
            self._gone[name] = revision
            while len(self._gone) > _GONE_MAX:
                self._gone.pop(next(iter(self._gone)))
        else:
            self._known[name] = _Known(deployment, revision)
            self._wishes[name] = deployment
            self._gone.pop(name, None)
        for listener in self._listeners:
            listener(name)

    # ---- changing ---------------------------------------------------------------

    async def apply(
        self,
        wanted: Sequence[Deployment],
        *,
        prune: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> list[DeploymentChange]:
        """Make these wishes stand; returns what changed, in the order of *wanted*.

        Args:
            prune: the manifests of which what *wanted* doesn't name is deleted.
            only: write no other than these, and delete nothing; all of *wanted* is checked. What
                changed is told of these alone.

        Raises:
            AlreadyExistsError: an agent id would belong to two deployments; nothing was written.
            PlacementError: a placement strategy is not known here; nothing was written.
            ConflictError: somebody else keeps changing the same deployment.
            BusTimeoutError, BusUnavailableError: some may have been written; apply again.
        """
        changes = diff(self._wishes, wanted, prune=prune)
        unchanged = [c.name for c in changes if c.kind is ChangeKind.SAME]
        if not await self._are_current(unchanged):
            changes = diff(self._wishes, wanted, prune=prune)
        after = {**self._wishes, **{deployment.name: deployment for deployment in wanted}}
        for change in changes:
            if change.kind is ChangeKind.REMOVED:
                after.pop(change.name, None)
        collision = find_collision(after.values()) or find_collision(wanted)
        if collision is not None:
            agent, first, second = collision
            raise AlreadyExistsError(
                f"The deployments {first!r} and {second!r} would both have an agent {agent!r}.",
                hint="Rename one of them, or delete it first.",
                agent=agent,
            )
        todo = [c for c in changes if c.kind in (ChangeKind.ADDED, ChangeKind.CHANGED)]
        for change in todo:
            before = change.before
            if before is not None and before.spec.parent is not None:
                raise AlreadyExistsError(
                    f"{change.name} is a child of {before.spec.parent.id}.",
                    hint="Choose another id, or stop it first.",
                    agent=change.name,
                )
        for change in todo:
            if change.after is not None:
                check_strategy(change.after.spec.placement.strategy, change.name)
        if only is not None:
            changes = [c for c in changes if c.name in only and c.kind is not ChangeKind.REMOVED]
            todo = [c for c in todo if c.name in only]
        began = utc_text()  # the leader acts on each wish as soon as it is there
        wishes = [c.after for c in todo if c.after is not None]
        await self._write_all([*wishes, *taken_over(changes)])
        for change in changes:
            if change.kind is ChangeKind.REMOVED:
                await self.delete(change.name)
        if todo:
            names = [change.name for change in todo]
            self._events.emit(
                "deployment",
                "applied",
                f"Applied {', '.join(names[:5])}{' …' if len(names) > 5 else ''}.",
                at=began,
                names=names[:100],
                count=len(names),
            )
        return changes

    async def scale(self, name: str, replicas: int, *, why: str = "") -> Deployment:
        """Change the number of replicas; returns the new wish.

        Args:
            why: who else than a person wants it. A person stays within the limits of
                ``autoscale``, since what is beyond them would be undone within seconds.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            ConfigError: it scales itself, and not as far as that.
            ConflictError: it is a single agent, or is being changed by others.
            BusTimeoutError: outcome unknown.
        """
        before: list[int | None] = []

        def scaled(current: Deployment) -> Deployment:
            if current.replicas is None:
                raise ConflictError(
                    f"{name} is a single agent and has no replicas to scale.",
                    hint="Give it `replicas` in its manifest first; its id becomes NAME-0.",
                )
            auto = current.autoscale
            if auto is not None and not why and not auto.min <= replicas <= auto.max:
                raise ConfigError(
                    f"{name} scales itself between {auto.min} and {auto.max} replicas, "
                    f"so it would not stay at {replicas}.",
                    hint="Change `autoscale` in its manifest, or take it out there.",
                    min=auto.min,
                    max=auto.max,
                )
            before[:] = [current.replicas]
            # Built anew, so that the limits of the model hold.
            wish = Deployment.model_validate({**current.model_dump(), "replicas": replicas})
            collision = find_collision([*({**self._wishes, name: wish}).values()])
            if collision is not None:
                raise AlreadyExistsError(
                    f"{collision[0]!r} is the id of another agent ({collision[2]}).",
                    hint="Scale to fewer replicas, or delete that agent.",
                )
            return wish

        began = utc_text()
        wish = await self.change(name, scaled)
        if before != [replicas]:
            self._events.emit(
                "deployment",
                "scaled",
                f"{name} goes from {before[0]} to {replicas} replicas.",
                at=began,
                name=name,
                before=before[0],
                after=replicas,
                **({"why": why} if why else {}),
            )
        return wish

    async def change(
        self,
        name: str,
        make: Callable[[Deployment], Deployment],
        *,
        failed: str | None = None,
    ) -> Deployment:
        """Replace the wish by what *make* gives for the present one; returns the new wish.

        *make* may be called several times. What changes the spec is remembered in the
        wish's history.

        Args:
            failed: why the present spec is given up, for its history.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            ConflictError: it is being changed by others.
            BusTimeoutError: outcome unknown.
        """
        for _ in range(_ATTEMPTS):
            current = self._wishes.get(name)
            if current is None:
                if await self._are_current([name]):
                    raise _unknown(name)
                continue
            wish = make(current)
            if wish == current:
                if await self._are_current([name]):
                    return current
                continue
            after = succeeding(current, wish, at=utc_text(), failed=failed)
            if await self._write(after):
                return self._wishes.get(name, after)  # it may be deleted by now
        raise ConflictError(f"{name} is being changed by others.", hint="Try again.")

    async def delete(self, name: str) -> None:
        """Withdraw a wish: its agents are stopped and forgotten.

        That of a child is marked first, so that its parent hears of it; the leader does the rest.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            BusTimeoutError: outcome unknown.
        """
        for _ in range(_ATTEMPTS):
            known = self._known.get(name)
            if known is None:
                if await self._are_current([name]):
                    raise _unknown(name)
                continue
            if known.deployment.spec.parent is not None:
                await self.change(name, _ending)
                self._events.emit("deployment", "deleted", f"{name} was deleted.", name=name)
                return
            try:
                await self.bucket.delete(name, expected=known.revision)
            except StaleRevisionError:
                await self._read(name)
                continue
            await self._read(name)
            self._events.emit("deployment", "deleted", f"{name} was deleted.", name=name)
            return
        raise ConflictError(f"{name} is being changed by others.", hint="Try again.")

    async def withdraw(self, wish: Deployment) -> None:
        """Delete the wish of a child that has ended, if it is still this one, and say whose it was.

        Raises:
            BusTimeoutError, BusUnavailableError: it may be there still.
        """
        known = self._known.get(wish.name)
        if known is None or known.deployment != wish:
            return
        with contextlib.suppress(StaleRevisionError):
            parent = wish.spec.parent
            mark = "" if parent is None else parent.signal
            await self.bucket.delete(wish.name, expected=known.revision, mark=mark)
        await self._read(wish.name)

    async def _read(self, name: str) -> None:
        entry = await self.bucket.read(name)
        if entry is not None:
            self._on_entry(entry)

    async def _are_current(self, names: Sequence[str]) -> bool:
        """Read these once more; whether they were as they are known here."""
        before = [self._known.get(name) for name in names]
        if names:
            for entry in (await self.bucket.read_many(list(names), by_now=True)).values():
                self._on_entry(entry)
        return before == [self._known.get(name) for name in names]

    async def _write_all(self, wishes: Sequence[Deployment]) -> None:
        gate = asyncio.Semaphore(256)

        async def write(wish: Deployment) -> None:
            async with gate:
                for _ in range(_ATTEMPTS):
                    if await self._write(self._after(wish)):
                        return
            raise ConflictError(
                f"{wish.name} is being changed by others.", hint="Apply the manifest again."
            )

        results = await asyncio.gather(*map(write, wishes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _after(self, wish: Deployment) -> Deployment:
        """A wish from outside, as the successor of what is known."""
        before = self._wishes.get(wish.name)
        if before is None:
            return wish.model_copy(update={"revision": 1})
        return succeeding(before, adopted(before, with_replicas_kept(before, wish)), at=utc_text())

    async def _write(self, wish: Deployment) -> bool:
        """Write *wish* over what is known; False: that was out of date and has been read again."""
        known = self._known.get(wish.name)
        expected = self._gone.get(wish.name, 0) if known is None else known.revision
        acked: asyncio.Future[PubAck] = asyncio.get_running_loop().create_future()

        def on_ack(ack: PubAck | FoundationError) -> None:
            if acked.done():
                return
            if isinstance(ack, FoundationError):
                acked.set_exception(ack)
            else:
                acked.set_result(ack)

        self.bucket.replace_nowait(wish.name, encode(wish), expected=expected, on_ack=on_ack)
        try:
            ack = await acked
        except StaleRevisionError:
            await self._read(wish.name)
            return False
        self._apply(wish.name, wish, ack.sequence)
        return True


def _ending(wish: Deployment) -> Deployment:
    if wish.ending is not None:
        return wish
    return wish.model_copy(update={"ending": Ending(reason="stopped by hand")})


def _unknown(name: str) -> DeploymentNotFoundError:
    return DeploymentNotFoundError(
        f"There is no deployment {name!r}.", hint="`foundation deployments` lists them."
    )
