"""`cluster.taps`: open a read-only look at live traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation_nats.observe.taps import Tap, TapItem

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster


class Taps:
    """Taps on a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._hosts: dict[str, str | None] = {}

    def open(
        self,
        pattern: str | None = None,
        *,
        type: str | None = None,
        agent: str | None = None,
        node: str | None = None,
        where: str | None = None,
        replay_s: float | None = None,
    ) -> Tap:
        """A tap to be entered with ``async with`` and iterated.

        Args:
            pattern: subjects or types that match, with ``*`` and ``>``.
            node: only agents that this node hosts; needs `prepare` first.

        Raises:
            ConfigError: *where* is no filter.
        """
        on_node = None if node is None else (lambda id: self._hosts.get(id) == node)
        return Tap(
            self._cluster.bus,
            self._cluster.subjects,
            pattern=pattern,
            type=type,
            agent=agent,
            on_node=on_node,
            where=where,
            replay_s=replay_s,
        )

    async def prepare(self) -> None:
        """Follow which node hosts which agent, for taps on one node."""
        registry = await self._cluster._open_registry()
        self._hosts = {id: held.record.node for id, held in registry.all().items()}
        registry.subscribe(
            lambda id, held: self._hosts.__setitem__(id, held.record.node if held else None)
        )


__all__ = ["Tap", "TapItem", "Taps"]
