"""`cluster.nodes`: who is there, by asking them; who comes and goes, by watching."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from foundation_nats.api.moves import DrainReport
from foundation_nats.api.refs import NodeInfo
from foundation_nats.api.watching import NodeChange, Watcher
from foundation_nats.base.logs import get_logger
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.control.rebalance import Drain
from foundation_nats.errors import (
    BusTimeoutError,
    ConfigError,
    NodeNotFoundError,
    NoRespondersError,
)
from foundation_schemas import (
    BrakeReply,
    Cordon,
    Heartbeat,
    LeaseRecord,
    Load,
    NodeRecord,
    NodeStatus,
    is_name,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.api.scaling import Removed
    from foundation_nats.launch.launcher import Launcher

_ASK_S = 0.6
LEADER_KEY = "leader"


class Nodes:
    """The nodes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def list(self) -> list[NodeInfo]:
        """Every node that has joined and was not forgotten, by name.

        The status is what the node answers now: ``up``, or ``draining`` if it is about to
        end or an operator empties it; ``suspect`` if it does not answer in time, ``down`` if nobody listens.
        """
        bus, subjects = self._cluster.bus, self._cluster.subjects
        entries = await Bucket(bus, subjects, "nodes").read_all()
        leader = await self.leader()
        cordons = await self._cluster.mover.cordons()
        records = [
            rpc.decode(NodeRecord, entry.value)
            for _, entry in sorted(entries.items())
            if entry.value is not None
        ]
        return list(
            await asyncio.gather(
                *(self._info(record, leader, cordons.get(record.name)) for record in records)
            )
        )

    async def force_failover(self) -> builtins.list[str]:
        """Let the verdicts that the storm brake holds back take effect now, on every node.

        From then on lost agents are started elsewhere as fast as usual, too. For a person who
        knows that the nodes are really gone. Returns who was told.
        """
        bus, subjects = self._cluster.bus, self._cluster.subjects
        told = []
        for node in await self.list():
            if node.status == NodeStatus.DOWN:
                continue
            subject = subjects.control_node(node.name, "force_failover")
            try:
                await rpc.tell(bus, subject, None, timeout=_ASK_S)
            except (NoRespondersError, BusTimeoutError):
                continue
            told.append(node.name)
        return told

    async def brake(self) -> BrakeReply | None:
        """What the storm brake holds back, or slows down, by the leader's word.

        None: nobody leads at the moment, or the leader does not answer.
        """
        leader = await self.leader()
        if leader is None:
            return None
        subject = self._cluster.subjects.control_node(leader.holder, "brake")
        try:
            return await rpc.call(self._cluster.bus, subject, None, BrakeReply, timeout=_ASK_S)
        except (NoRespondersError, BusTimeoutError):
            return None

    async def views(self) -> Mapping[str, NodeView]:
        """The nodes as a planner wants them, by name."""
        found = {}
        for node in await self.list():
            record = NodeRecord(
                name=node.name,
                incarnation=node.incarnation,
                workers=node.workers,
                capabilities=node.capabilities,
                labels=node.labels,
                capacity=node.capacity,
                cordoned=node.cordoned,
                cordon_reason=node.cordon_reason,
                short_lives=node.short_lives,
            )
            load = Load(agents=node.agents, **node.load)  # type: ignore[arg-type]
            status = NodeStatus(node.status)
            found[node.name] = NodeView(record, status, load, True, flaps=node.distrusted)
        return found

    async def view(self) -> ClusterView:
        """The nodes at this moment as this client sees them, all at once: an immutable snapshot.

        By listening, not by asking, so it costs nothing to take; the first call begins to
        listen, which costs some 0.3 s. Its `revision` grows with every change, so that two
        views of one client can be put in order; views of two clients can't. To follow
        changes, `watch`.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        return (await self._cluster._open_changes()).view()

    async def _info(
        self, record: NodeRecord, leader: LeaseRecord | None, cordon: Cordon | None
    ) -> NodeInfo:
        bus, subjects = self._cluster.bus, self._cluster.subjects
        beat: Heartbeat | None = None
        try:
            subject = subjects.control_node(record.name, "heartbeat")
            beat = await rpc.call(bus, subject, None, Heartbeat, timeout=_ASK_S)
            is_drained = cordon is not None and cordon.drain and cordon.drained_at is None
            status = NodeStatus.DRAINING if beat.draining or is_drained else NodeStatus.UP
        except NoRespondersError:
            status = NodeStatus.DOWN
        except BusTimeoutError:
            status = NodeStatus.SUSPECT
        load = beat.load.model_dump() if beat is not None else {}
        return NodeInfo(
            name=record.name,
            status=status,
            incarnation=beat.incarnation if beat is not None else record.incarnation,
            agents=int(load.pop("agents", 0)),
            load=load,
            capacity=record.capacity,
            labels=record.labels,
            capabilities=record.capabilities,
            workers=record.workers,
            host=record.host,
            pid=record.pid,
            leader=leader is not None and leader.holder == record.name,
            started_at=record.started_at,
            cordoned=cordon is not None,
            cordon_reason="" if cordon is None else cordon.reason,
            short_lives=record.short_lives,
            distrusted=beat is not None and beat.distrusted,
        )

    async def get(self, name: str) -> NodeInfo:
        """One node.

        Raises:
            NodeNotFoundError: none of that name has joined.
        """
        for node in await self.list():
            if node.name == name:
                return node
        raise NodeNotFoundError(
            f"There is no node {name!r}.", hint="`foundation nodes` lists them."
        )

    async def leader(self) -> LeaseRecord | None:
        """Who leads, by the lease; None while nobody does."""
        bucket = Bucket(self._cluster.bus, self._cluster.subjects, "leases")
        entry = await bucket.read(LEADER_KEY)
        if entry is None or entry.value is None:
            return None
        return rpc.decode(LeaseRecord, entry.value)

    # ---- maintenance -------------------------------------------------------------

    async def cordon(self, name: str, *, reason: str = "") -> None:
        """Give the node no new agents from now on; those it has stay. Idempotent.

        It belongs to the node's name: also its next life is cordoned, until `uncordon`.

        Raises:
            NodeNotFoundError: none of that name has joined.
            ConflictError: others keep changing it.
        """
        await self._cluster.mover.cordon(name, reason)

    async def uncordon(self, name: str) -> None:
        """Let the node get agents again; a drain that goes on ends. Idempotent.

        Raises:
            NodeNotFoundError: none of that name has joined, or was cordoned.
            ConflictError: others keep changing it.
        """
        await self._cluster.mover.uncordon(name)

    async def plan_drain(self, name: str) -> Drain:
        """Where `drain` would move the node's agents, and which of them fit nowhere else.

        Raises:
            NodeNotFoundError: none of that name has joined.
        """
        return await self._cluster.mover.plan_drain(name)

    async def drain(
        self,
        name: str,
        *,
        timeout: float = 60.0,
        force: bool = False,
        reason: str = "",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> DrainReport:
        """Cordon the node and move all its agents away; returns when it is empty.

        A few agents at a time, each with its state and its unread signals. The node stays up.
        Agents that fit nowhere else stay and run; with *force* they are stopped, and wait.
        The wish stands until `uncordon`, also if this raises: the leader goes on.

        Raises:
            NodeNotFoundError: none of that name has joined.
            NotSettledError: not empty in time, or only agents are left that fit nowhere else:
                `details["reasons"]` says why, per agent.
        """
        return await self._cluster.mover.drain(
            name, timeout=timeout, force=force, reason=reason, on_progress=on_progress
        )

    # ---- more and fewer ----------------------------------------------------------

    async def add(
        self,
        count: int = 1,
        *,
        prefix: str = "node",
        workers: int | None = None,
        imports: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        capabilities: Sequence[str] = (),
        capacity: Mapping[str, float] | None = None,
        domains: Sequence[str] = (),
        metrics: str | None = None,
        log_level: str = "info",
        log_json: bool = False,
        launcher: str | Launcher | None = None,
        timeout: float = 60.0,
    ) -> builtins.list[NodeInfo]:
        """Start nodes named *prefix* and the next free numbers, and wait until they are up.

        Args:
            metrics: ``HOST:PORT`` where the first serves its metrics; the others at the ports after it.
            launcher: ``local`` (processes of this machine that outlive this program), ``command``,
                one of an installed package, or one of your own; None: as ``launcher.kind`` says.

        Raises:
            ConfigError: an argument or a setting of the launcher is wrong.
            LaunchError: one could not be started; `details["started"]` names the others.
            NotSettledError: not up in time, or ended before; with what its log says.
            BusUnavailableError, BusTimeoutError
        """
        from foundation_nats.api.scaling import add_nodes
        from foundation_nats.launch.launcher import LaunchOptions
        from foundation_nats.launch.registry import launcher_of

        if count < 1:
            raise ConfigError(f"At least one node must be added, not {count}.")
        if not is_name(f"{prefix}-1"):
            raise ConfigError(
                f"{prefix!r} can't begin a node's name: use letters, digits, '-' and '_'."
            )
        config = self._cluster.config
        if launcher is None or isinstance(launcher, str):
            launcher = launcher_of(launcher or config.launcher.kind, config)
        options = LaunchOptions(
            workers=workers,
            imports=tuple(imports),
            labels=dict(labels or {}),
            capabilities=tuple(capabilities),
            capacity=dict(capacity or {}),
            domains=tuple(domains),
            metrics=metrics,
            log_level=log_level,
            log_json=log_json,
        )
        return await add_nodes(
            self._cluster, launcher, count, prefix=prefix, options=options, timeout=timeout
        )

    async def remove(
        self,
        *names: str,
        force: bool = False,
        launcher: str | Launcher | None = None,
        timeout: float = 60.0,
    ) -> builtins.list[Removed]:
        """Drain nodes, let them end, and wait until they have left.

        Args:
            force: also where no node would be left to take the agents.
            launcher: who clears away what is left of a node; None: whoever has started it from
                this machine, and else nobody: it is asked to drain and end by itself.

        Raises:
            NodeNotFoundError: there is none of that name; nothing was done.
            ConflictError: no node would be left, or one runs within another program.
            NotSettledError: not gone in time.
            LaunchError: what is left of one could not be cleared away.
            BusUnavailableError, BusTimeoutError
        """
        from foundation_nats.api.scaling import remove_nodes
        from foundation_nats.launch.registry import launcher_of, starter_of

        config = self._cluster.config
        is_said = launcher is not None or config.launcher.kind != "local"
        given = launcher

        def launcher_for(name: str) -> Launcher | None:
            if given is not None and not isinstance(given, str):
                return given
            known = starter_of(name, config)
            if known is not None or not is_said:
                return known
            return launcher_of(given or config.launcher.kind, config)

        return await remove_nodes(
            self._cluster, names, launcher_of=launcher_for, timeout=timeout, force=force
        )

    # ---- coming and going --------------------------------------------------------

    async def watch(self, *, present: bool = False) -> AsyncGenerator[NodeChange, None]:
        """Every change from now on: joined, left, suspect, down, returned; with the node's record.

        With *present* the nodes that are up come first, as ``joined``. It is this
        client's own judgement, by what it hears: see `foundation_nats.api.watching`.
        A reader that is 1000 changes behind loses the oldest.

        Example:
            >>> async for change in cluster.nodes.watch():
            ...     print(change.kind, change.node, change.record.labels)

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()
        watcher = Watcher()
        end = changes.listen(watcher.put)
        missed = 0
        try:
            for change in changes.present() if present else ():
                yield change
            while True:
                change = await watcher.next()
                if watcher.missed > missed:
                    get_logger("nodes").warning(
                        "a reader of node changes does not keep up", missed=watcher.missed
                    )
                    missed = watcher.missed
                yield change
        finally:
            end()

    async def on_up(self, callback: Callable[[NodeChange], object]) -> Callable[[], None]:
        """Call *callback* whenever a node joins or returns; returns what ends that.

        It is called in the event loop and must not block; what it raises is logged.
        Nodes that are up already are not told: `list` them, or `watch(present=True)`.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()

        def listener(change: NodeChange) -> None:
            if change.is_up:
                callback(change)

        return changes.listen(listener)

    async def on_down(self, callback: Callable[[NodeChange], object]) -> Callable[[], None]:
        """Call *callback* whenever a node leaves or is judged to be down; see `on_up`.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()

        def listener(change: NodeChange) -> None:
            if change.is_down:
                callback(change)

        return changes.listen(listener)
