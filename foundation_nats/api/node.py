"""`Node`: one member of the cluster, hosting agents."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from foundation_nats.config import Config
from foundation_nats.node.manager import NodeManager, NodeOptions
from foundation_nats.node.spawning import Child


class Node:
    """A node manager in this process, with its worker processes.

    Example:
        >>> async with Node(NodeOptions(name="n1", workers=2)):
        ...     await asyncio.Event().wait()
    """

    def __init__(
        self,
        options: NodeOptions | None = None,
        config: Config | None = None,
        *,
        spare: Sequence[Child] = (),
    ) -> None:
        self._manager = NodeManager(options or NodeOptions(), config or Config.load(), spare=spare)

    @property
    def name(self) -> str:
        """The node's name."""
        return self._manager.name

    @property
    def worker_pids(self) -> dict[str, int]:
        """Worker id to process id."""
        return self._manager.worker_pids

    async def start(self) -> None:
        """Join the cluster; returns when the node is up. Raises as `NodeManager.start`."""
        await self._manager.start()

    async def stop(self, *, drain: bool = True) -> None:
        """Leave the cluster; with *drain* its agents go elsewhere first."""
        await self._manager.stop(drain=drain)

    async def run(self) -> int:
        """Start, serve until a signal says stop, stop; returns the exit code."""
        return await self._manager.run()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


__all__ = ["Node", "NodeOptions"]
