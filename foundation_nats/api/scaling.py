"""`add_nodes` and `remove_nodes`: more nodes and fewer, by a launcher, and seen through to the end.

A node is added once it is up with all its workers. One is removed once it has
handed over its agents and left, its process is cleared away, and no agent's
record names it any more as where it runs. A node that dies meanwhile is
removed all the same; that its agents were recovered instead of moved is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from foundation_nats.api.refs import NodeInfo
from foundation_nats.base.clock import monotonic
from foundation_nats.base.process import log_tail
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.cluster.registry import Held
from foundation_nats.control.rebalance import Drain, drain_moves
from foundation_nats.errors import (
    AlreadyExistsError,
    BusError,
    BusTimeoutError,
    ConflictError,
    FoundationError,
    LaunchError,
    NodeNotFoundError,
    NoRespondersError,
    NotSettledError,
)
from foundation_nats.launch.launcher import Ending, Launched, Launcher, LaunchOptions
from foundation_schemas import AgentRecord, AgentStatus, Heartbeat, InspectReply, NodeStatus

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

ADD_MAX = 256
_POLL_S = 0.05
_ASK_S = 1.0
_TELL_S = 2.0
_NAMES_TRIED = 20
_END_S = 5.0
"""How long the process of a node that has left may take to end."""
_DYING_S = 1.0
"""How long a node is looked at that did not take the order to stop: is it dead?"""
_SIGNAL_S = 10.0
"""How long a node may take to drain by SIGTERM that does not answer on the bus."""
_RECOVERY_S = 15.0
"""How long agents of a node that is gone may take to be placed elsewhere, at least."""
_HOLDING = (AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING)

LauncherOf = Callable[[str], Launcher | None]


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing nodes would do."""

    drains: dict[str, Drain]
    """Node to where its agents would go, and which of them nobody else can take."""
    is_last: bool
    """No node would be left to take agents."""

    @property
    def moves(self) -> int:
        """Agents that would move."""
        return sum(len(drain.moves) for drain in self.drains.values())

    @property
    def stuck(self) -> dict[str, dict[str, str]]:
        """Agents that would wait, to the reason per node."""
        return {
            agent: dict(why) for drain in self.drains.values() for agent, why in drain.stuck.items()
        }


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of one node."""

    node: str
    drained: bool
    """It has handed over its agents and left; else it died or was killed, and they were recovered."""
    how: str
    """For people."""
    waiting: list[str] = field(default_factory=list)
    """Agents that wait for its return, because their wish is so."""


async def add_nodes(
    cluster: Cluster,
    launcher: Launcher,
    count: int,
    *,
    prefix: str = "node",
    options: LaunchOptions | None = None,
    timeout: float = 60.0,
    started: Callable[[Launched], None] = lambda _: None,
) -> list[NodeInfo]:
    """Start *count* nodes named *prefix* and the next free numbers, and wait until they are up.

    What was started stays when another one can't be, or is late: it may yet come up,
    and `remove_nodes` takes it away.

    Raises:
        ConfigError: there are not so many ports for their metrics; nothing was started.
        LaunchError: one could not be started; `details["started"]` names the others.
        NotSettledError: not up in time, or ended before; with what its log says.
        BusUnavailableError, BusTimeoutError
    """
    options = options or LaunchOptions()
    deadline = monotonic() + timeout
    # A cordon belongs to a name: a new node must not inherit one.
    taken = {node.name for node in await cluster.nodes.list()} | {*await cluster.mover.cordons()}
    launched: dict[str, Launched] = {}
    each = [options.nth(number) for number in range(count)]
    for given in each:
        try:
            item = await _start_next(launcher, prefix, taken, given)
        except FoundationError as error:
            error.details["started"] = sorted(launched)
            if launched:
                rest = f"Started: {', '.join(launched)}; they stay."
                error.hint = f"{error.hint} {rest}" if error.hint else rest
            raise
        launched[item.name] = item
        started(item)
    await _wait_up(cluster, launcher, launched, options, deadline, timeout)
    infos = {node.name: node for node in await cluster.nodes.list()}
    return [infos[name] for name in launched if name in infos]


async def _start_next(
    launcher: Launcher, prefix: str, taken: set[str], options: LaunchOptions
) -> Launched:
    number = 0
    for _ in range(_NAMES_TRIED):
        number = next(
            n for n in range(number + 1, number + 2 + len(taken)) if f"{prefix}-{n}" not in taken
        )
        name = f"{prefix}-{number}"
        try:
            found = await launcher.start(name, options)
        except AlreadyExistsError:
            taken.add(name)  # somebody else is starting it, or it doesn't answer yet
            continue
        taken.add(name)
        return found
    raise LaunchError(
        f"No free name of the form {prefix}-NUMBER was found.", hint="Give another prefix."
    )


async def _wait_up(
    cluster: Cluster,
    launcher: Launcher,
    launched: dict[str, Launched],
    options: LaunchOptions,
    deadline: float,
    timeout: float,
) -> None:
    waiting = dict(launched)
    while waiting:
        ready = await asyncio.gather(*(_is_up(cluster, item, options) for item in waiting.values()))
        waiting = {
            name: item
            for (name, item), is_up in zip(waiting.items(), ready, strict=True)
            if not is_up
        }
        known = {item.name: item for item in await launcher.list()}
        for name, item in waiting.items():
            now = known.get(name)
            if now is None or now.is_running is False:
                said = "" if item.log is None else f" ({log_tail(item.log)})"
                if now is not None:
                    await launcher.stop(name, timeout=0.0)
                raise NotSettledError(
                    f"Node {name} ended before it was up{said}.",
                    hint=None if item.log is None else f"Its log: {item.log}.",
                    started=sorted(launched),
                )
        if waiting and monotonic() >= deadline:
            said = "; ".join(
                name if item.log is None else f"{name} ({log_tail(item.log)})"
                for name, item in waiting.items()
            )
            raise NotSettledError(
                f"Not up after {timeout:g} s: {said}.",
                hint="They may yet come up: `foundation nodes` shows it, "
                f"`foundation nodes remove {' '.join(waiting)}` takes them away.",
                started=sorted(launched),
            )
        if waiting:
            await asyncio.sleep(_POLL_S)


async def _is_up(cluster: Cluster, item: Launched, options: LaunchOptions) -> bool:
    """Whether this very node answers, and all its workers have imported what they must."""
    name = item.name
    subject = cluster.subjects.control_node(name, "inspect")
    try:
        found = await rpc.call(cluster.bus, subject, None, InspectReply, timeout=_ASK_S)
        if options.workers is not None:
            workers = [f"{name}-w{number}" for number in range(options.workers)]
        else:
            workers = (await cluster.nodes.get(name)).workers
    except (BusError, NodeNotFoundError):
        return False
    if item.pid is not None and found.details.get("pid") != item.pid:
        return False  # another node had the name already
    return all(worker in found.details for worker in workers)


# ---- fewer ------------------------------------------------------------------------------


async def plan_removal(cluster: Cluster, names: Sequence[str]) -> Removal:
    """What would become of the agents if these nodes went, one after the other.

    Raises:
        BusUnavailableError, BusTimeoutError
    """
    views = dict(await cluster.nodes.views())
    wishes, held = await asyncio.gather(cluster.deployments.wishes(), _held(cluster))
    leader = await cluster.nodes.leader()
    reserved = await cluster.resources.reserved(views)
    staying = [
        view for name, view in views.items() if name not in names and view.status is NodeStatus.UP
    ]
    for name in names:
        if name in views and views[name].status is NodeStatus.UP:
            views[name] = replace(views[name], status=NodeStatus.DRAINING)
    drains = {}
    for name in names:
        drain = drain_moves(
            name,
            wishes,
            held,
            views,
            leader=None if leader is None else leader.holder,
            reserved=reserved,
        )
        drains[name] = drain
        for move in drain.moves:
            item = held[move.agent]
            update = {"node": move.target, "incarnation": views[move.target].incarnation}
            held[move.agent] = Held(item.record.model_copy(update=update), item.revision)
    return Removal(drains, is_last=not staying)


async def _held(cluster: Cluster) -> dict[str, Held]:
    entries = await Bucket(cluster.bus, cluster.subjects, "agents").read_all()
    return {
        agent: Held(rpc.decode(AgentRecord, entry.value), entry.revision)
        for agent, entry in entries.items()
        if entry.value is not None
    }


async def remove_nodes(
    cluster: Cluster,
    names: Sequence[str],
    *,
    launcher_of: LauncherOf = lambda _: None,
    timeout: float = 60.0,
    force: bool = False,
    removed: Callable[[Removed], None] = lambda _: None,
) -> list[Removed]:
    """Drain nodes, let them end, and wait until they have left.

    Args:
        launcher_of: who has started a node; None: nobody we know, so that it is only asked
            to end. A process of a launcher that hasn't ended after *timeout* is killed.
        force: also where no node would be left to take the agents.

    Raises:
        NodeNotFoundError: there is none of that name; nothing was done.
        ConflictError: no node would be left, or one runs within another program.
        NotSettledError: not gone in time.
        LaunchError: what is left of one could not be cleared away.
        BusUnavailableError, BusTimeoutError
    """
    names = list(dict.fromkeys(names))
    launchers = {name: launcher_of(name) for name in names}
    infos = {node.name: node for node in await cluster.nodes.list()}
    for name in names:
        if name not in infos and not await _has_started(launchers[name], name):
            raise NodeNotFoundError(
                f"There is no node {name!r}.",
                hint=_near(name, list(infos)) or "`foundation nodes` lists them.",
            )
    if not force and any(_is_alive(infos.get(name)) for name in names):
        await _refuse_last(cluster, names)
    remover = _Remover(cluster, monotonic() + timeout, timeout)
    # All at once, so that none of them is given the agents of another one.
    tasks = [
        asyncio.create_task(remover.remove(name, infos.get(name), launchers[name]))
        for name in names
    ]
    try:
        for task in asyncio.as_completed(tasks):
            removed(await task)
    finally:
        for pending in tasks:
            pending.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


def _is_alive(info: NodeInfo | None) -> bool:
    return info is not None and info.status != NodeStatus.DOWN


async def _has_started(launcher: Launcher | None, name: str) -> bool:
    return launcher is not None and name in {item.name for item in await launcher.list()}


async def _refuse_last(cluster: Cluster, names: Sequence[str]) -> None:
    plan = await plan_removal(cluster, names)
    if not plan.is_last:
        return
    held = await _held(cluster)
    count = sum(item.record.node in names for item in held.values())
    agents = "its 1 agent" if count == 1 else f"{count or 'no'} agents"
    which = "the last node that takes" if len(names) == 1 else "the last nodes that take"
    raise ConflictError(
        f"{', '.join(names)}: {which} agents; {agents} would stop and wait for another one.",
        hint="Add a node first, or say --force.",
        agents=count,
    )


class _Remover:
    """Removes nodes by a common deadline."""

    def __init__(self, cluster: Cluster, deadline: float, timeout: float) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._timeout = timeout
        self._nodes = Bucket(cluster.bus, cluster.subjects, "nodes")

    async def remove(self, name: str, info: NodeInfo | None, launcher: Launcher | None) -> Removed:
        """Remove one node."""
        drained, how, is_gone = False, "was down already", True
        if info is None:
            how = "had not joined"
        elif _is_alive(info):
            was_told = await self._tell_stop(name)
            soon = min(self._deadline, monotonic() + _DYING_S)
            left = await self._until_gone(name, self._deadline if was_told else soon)
            is_gone = left is not None
            match left, was_told:
                case True, _:
                    drained, how = True, "drained and left"
                case False, _:
                    how = "died while it was drained" if was_told else "had just died"
                case None, True:
                    how = "did not hand over its agents in time"
                case None, False:
                    how = "did not answer"
        ending = None
        if launcher is not None:
            with contextlib.suppress(NodeNotFoundError):
                patience = _END_S if is_gone else self._patience()
                ending = await launcher.stop(name, timeout=patience)
        if not is_gone and ending is None:
            raise self._not_gone(name, how)
        if ending is Ending.KILLED:
            drained, how = False, f"{how}, and was killed"
        elif not is_gone:
            how = f"{how}, and was ended by its launcher"
        return Removed(name, drained, how, await self._wait_recovered(name))

    def _patience(self) -> float:
        """For a process that is to be killed: little if its time is over."""
        return max(0.2, min(_SIGNAL_S, self._deadline - monotonic()))

    async def _tell_stop(self, name: str) -> bool:
        subject = self._cluster.subjects.control_node(name, "stop")
        try:
            await rpc.tell(self._cluster.bus, subject, None, timeout=_TELL_S)
        except (NoRespondersError, BusTimeoutError):
            return False
        return True

    async def _until_gone(self, name: str, deadline: float) -> bool | None:
        """Whether the node said good-bye (True) or died (False); None: it is there at the deadline."""
        subject = self._cluster.subjects.control_node(name, "heartbeat")
        silent = 0
        while monotonic() < deadline:
            try:
                entry = await self._nodes.read(name)
                if entry is None or entry.value is None:
                    return True
                await rpc.call(self._cluster.bus, subject, None, Heartbeat, timeout=_ASK_S)
                silent = 0
            except NoRespondersError:
                # It leaves by deleting its record, and then falls silent: look once more.
                silent += 1
                if silent >= 3:
                    return False
            except BusError:
                pass  # the bus or the node is busy; the deadline counts
            await asyncio.sleep(_POLL_S)
        return None

    async def _wait_recovered(self, name: str) -> list[str]:
        """Wait until no agent is recorded as being on the node; returns those that wait for it."""
        deadline = max(self._deadline, monotonic() + _RECOVERY_S)
        while True:
            held = [item.record for item in (await _held(self._cluster)).values()]
            mine = [record for record in held if record.node == name]
            left = [record.id for record in mine if record.status in _HOLDING]
            if not left:
                return [record.id for record in mine if record.status is AgentStatus.UNAVAILABLE]
            if monotonic() >= deadline:
                raise NotSettledError(
                    f"{name} is gone, but {len(left)} of its agents are not recovered yet.",
                    hint=f"See `foundation why {left[0]}`.",
                    node=name,
                    agents=left[:20],
                )
            await asyncio.sleep(_POLL_S)

    def _not_gone(self, name: str, how: str) -> NotSettledError:
        if how == "did not answer":
            return NotSettledError(
                f"{name} does not answer, and was not started from here.",
                hint="End its process where it runs; `foundation nodes -o json` has host and pid.",
                node=name,
            )
        return NotSettledError(
            f"{name} has not left within {self._timeout:g} s; it goes on handing over its agents.",
            hint=f"See `foundation agents --node {name}`.",
            node=name,
        )


def _near(name: str, known: list[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else None


__all__ = ["Removal", "Removed", "add_nodes", "plan_removal", "remove_nodes"]
