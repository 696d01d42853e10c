"""`Roster`: which agents a gateway is for, and what each of them is, as the registry says it.

An agent is on it while it is wanted, whether it runs just now or is being moved or recovered: who
prompts it meanwhile waits. Where it is not known yet what a class is for, its agents are described
by their names alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

from foundation_nats.agent.prompts import PROMPT
from foundation_nats.api.cluster import Cluster
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.cluster.registry import Held
from foundation_nats.errors import ConfigError, FoundationError
from foundation_schemas import ClassInfo, Target

_DESCRIBE_AGAIN_S = 5.0
_REFRESH_S = 60.0


@dataclass(frozen=True, slots=True)
class Listed:
    """An agent."""

    id: str
    run: str
    """``module:Class``."""
    deployment: str | None
    capabilities: tuple[str, ...]
    description: str = ""
    """The first line of the class's docstring."""
    handles: tuple[str, ...] = ()
    """The types of signals that the class handles."""

    @property
    def family(self) -> str:
        """What it is one of: its deployment, or itself."""
        return self.deployment or self.id


class Roster:
    """The agents that answer prompts, or others; `open` it, then look or `subscribe`."""

    def __init__(
        self, cluster: Cluster, only: Collection[str] = (), *, providing: str | None = PROMPT
    ) -> None:
        """*only*: targets, such as ``chat`` or ``deployment:chat``; empty: all.

        *providing*: a capability that they must provide; None: any or none.

        Raises:
            ConfigError: one of them is none, or one that is no agent, deployment or capability.
        """
        self._cluster = cluster
        self._only = [_checked(item) for item in only]
        self._providing = providing
        self._listed: dict[str, Listed] = {}
        self._infos: dict[str, ClassInfo | None] = {}
        self._unknown = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._is_open = False
        self._log = get_logger("gateway")

    async def open(self, scope: TaskScope) -> None:
        """Read the registry and follow it until *scope* ends.

        Raises:
            BusTimeoutError, BusUnavailableError: it could not be read.
        """
        registry = await self._cluster._open_registry()
        registry.subscribe(self._on_change)
        for id, held in list(registry.all().items()):
            self._take(id, held)
        await self._describe()
        self._is_open = True
        scope.start(self._keep_describing(), "describe")

    def all(self) -> list[Listed]:
        """All of them, by id."""
        return [self._listed[id] for id in sorted(self._listed)]

    def get(self, id: str) -> Listed | None:
        """One of them; None: there is no such agent, or it is none of them."""
        return self._listed.get(id)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call *listener* after every change of who is listed or what is known of them."""
        self._listeners.append(listener)

    def _on_change(self, id: str, held: Held | None) -> None:
        if self._take(id, held) and self._is_open:
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _take(self, id: str, held: Held | None) -> bool:
        """Whether that changes anything."""
        before = self._listed.get(id)
        if held is None or not held.record.is_wanted or not self._is_meant(held):
            self._listed.pop(id, None)
            return before is not None
        spec = held.record.spec
        info = self._infos.get(spec.run)
        after = Listed(
            id,
            spec.run,
            held.record.deployment,
            tuple(spec.capabilities),
            "" if info is None else info.doc or "",
            () if info is None else tuple(info.handles),
        )
        if spec.run not in self._infos:
            self._unknown.set()
        self._listed[id] = after
        return before != after

    def _is_meant(self, held: Held) -> bool:
        capabilities = held.record.spec.capabilities
        if self._providing is not None and self._providing not in capabilities:
            return False
        return not self._only or any(
            (kind == "agent" and name == held.record.id)
            or (kind == "deployment" and name == held.record.deployment)
            or (kind == "capability" and name in capabilities)
            for kind, name in self._only
        )

    async def _describe(self, *, again: bool = False) -> None:
        """Ask a node what the classes are that nobody has told us of yet, or all of them."""
        self._unknown.clear()
        known = set() if again else self._infos.keys()
        runs = sorted({item.run for item in self._listed.values()} - known)
        if not runs:
            return
        found = await self._cluster.deployments.describe(runs)
        if found is None:
            self._unknown.set()
            return
        self._infos |= {run: found.get(run) for run in runs}
        registry = await self._cluster._open_registry()
        for id in list(self._listed):
            self._take(id, registry.get(id))

    async def _keep_describing(self) -> None:
        while True:
            again = False
            try:
                async with asyncio.timeout(_REFRESH_S):
                    await self._unknown.wait()
            except TimeoutError:
                again = True  # code is reloaded at times
            try:
                await self._describe(again=again)
                self._tell()
            except FoundationError as error:
                self._unknown.set()
                self._log.info("classes not described", error=str(error))
            if self._unknown.is_set():
                await asyncio.sleep(_DESCRIBE_AGAIN_S)


def _checked(text: str) -> tuple[str, str]:
    try:
        target = Target.parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if target.kind not in ("agent", "deployment", "capability"):
        raise ConfigError(
            f"{text!r} names no agents of a gateway.",
            hint="Use ID, deployment:NAME or capability:NAME.",
        )
    return str(target.kind), target.name


__all__ = ["Listed", "Roster"]
