"""`cluster.agents`: start, stop, look up."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import orjson

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.loading import run_name
from foundation_nats.api.history import History, Recording, read_history, read_recording
from foundation_nats.api.refs import AgentInfo, AgentRef
from foundation_nats.api.resources import Reservation
from foundation_nats.base.clock import monotonic
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.errors import (
    AgentNotFoundError,
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    NotSettledError,
    StaleRevisionError,
)
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    RateLimit,
    RestartLimit,
    StateRecord,
    StepRecord,
    Subscription,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_ATTEMPTS = 5


class Agents:
    """The agents of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._bucket = Bucket(cluster.bus, cluster.subjects, "agents")
        self._state = Bucket(cluster.bus, cluster.subjects, "state")

    async def start(
        self,
        run: type[Agent] | str,
        *,
        id: str,
        critical: bool | None = None,
        durable: bool | None = None,
        capabilities: Collection[str] = (),
        resources: dict[str, float] | None = None,
        placement: dict[str, Any] | None = None,
        on_node_loss: str | dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        restart: str | None = None,
        restart_limit: RestartLimit | dict[str, Any] | None = None,
        rate: RateLimit | dict[str, Any] | None = None,
        reservation: str | Reservation | None = None,
        labels: dict[str, str] | None = None,
        subscribe: Collection[str | Subscription] = (),
        wait: bool = True,
        timeout: float = 10.0,
    ) -> AgentRef:
        """Want one agent to run for good, and wait until it does.

        Idempotent for an equal wish; a changed one updates the agent. If it
        times out the wish stands and the cluster goes on trying.

        Args:
            run: the class, or ``"module:Class"`` as the nodes can import it.
            on_node_loss: ``restart``, ``unavailable`` or ``stop``, or ``{"policy": …, "grace_s": 30}``.
            restart_limit: more restarts than ``{"max_restarts": 3, "within_s": 60}`` and it is left alone.
            rate: how fast it takes in what it is sent: ``{"per_s": 100, "burst": 10, "per_sender": 5}``.
            reservation: of `cluster.resources.reserve`: the agent starts on its node, and it
                becomes the agent's share. If it has expired, or the node can't run the
                agent, the agent is placed like any other.
            labels: its own, for targets of ``label:EXPRESSION``.
            subscribe: topics whose signals it is sent, besides those of its class.

        Raises:
            ConfigError: the class can't run on the nodes, or an argument is wrong.
            AlreadyExistsError: the id belongs to a deployment.
            NotSettledError: not running in time; says why.
            BusUnavailableError, BusTimeoutError
        """
        name = run if isinstance(run, str) else run_name(run)
        try:
            given = {
                "critical": critical,
                "durable": durable,
                "capabilities": sorted(capabilities) or None,
                "resources": resources,
                "placement": placement,
                "on_node_loss": on_node_loss or None,
                "config": config,
                "restart": restart,
                "restart_limit": restart_limit,
                "rate": rate,
                "reservation": reservation.id
                if isinstance(reservation, Reservation)
                else reservation,
                "labels": labels,
                "subscribe": list(subscribe) or None,
            }
            # What was not given, the class may say.
            said = {key: value for key, value in given.items() if value is not None}
            spec = AgentSpec.model_validate({"run": name, **said})
            wish = Deployment(name=id, spec=spec, standalone=True)
        except ValueError as error:
            raise ConfigError(f"agent {id!r}: {error}") from error
        deployments = self._cluster.deployments
        known = await deployments.wishes()
        if id in known and not known[id].standalone:
            raise AlreadyExistsError(f"{id!r} is a deployment already.")
        (change,) = await deployments.apply([wish])
        if wait:
            wanted = change.after or wish
            await self._wait_running(id, wanted.spec.digest(), timeout)
        return AgentRef(self._cluster, id)

    async def _wait_running(self, id: str, digest: str, timeout: float) -> None:
        deadline = monotonic() + timeout
        status, reason = "pending", "no node has taken it yet"
        while monotonic() < deadline:
            record = await self._record(id)
            if record is not None and record.digest == digest:
                if record.status is AgentStatus.RUNNING:
                    return
                status, reason = record.status, record.reason or reason
                if record.status is AgentStatus.FAILED and record.failures >= 1:
                    raise NotSettledError(
                        f"Agent {id} failed to start: {record.reason}",
                        hint="It will be tried again; `foundation agent` shows it.",
                        status=str(status),
                    )
            await asyncio.sleep(0.01)
        raise NotSettledError(
            f"Agent {id} is {status} after {timeout:g} s: {reason}.",
            hint="The wish stands, and the cluster goes on trying.",
            status=str(status),
        )

    async def stop(self, id: str, *, timeout: float = 10.0) -> None:
        """Want the agent no more; returns when it has stopped. Its stored state is kept.

        Raises:
            AgentNotFoundError: there is none, or it belongs to a deployment (scale that).
            NotSettledError: not stopped in time; it will be.
        """
        wishes = await self._cluster.deployments.wishes()
        if id not in wishes:
            record = await self._record(id)
            if record is not None and record.deployment is not None:
                raise AgentNotFoundError(
                    f"Agent {id} belongs to the deployment {record.deployment}.",
                    hint=f"Scale or delete {record.deployment} instead.",
                )
            raise self._not_found(id)
        await self._cluster.deployments.delete(id)
        deadline = monotonic() + timeout
        while monotonic() < deadline:
            if await self._record(id) is None:
                return
            await asyncio.sleep(0.01)
        raise NotSettledError(f"Agent {id} has not stopped within {timeout:g} s.")

    async def release(self, id: str) -> AgentInfo:
        """Try a failed agent again at once, also one in quarantine: its failures are forgotten.

        Raises:
            AgentNotFoundError: there is none of this id.
            ConflictError: it has not failed, or is being changed by others.
            BusTimeoutError: outcome unknown.
        """
        for _ in range(_ATTEMPTS):
            entry = await self._bucket.read(id)
            if entry is None or entry.value is None:
                raise self._not_found(id)
            record = rpc.decode(AgentRecord, entry.value)
            if record.status is not AgentStatus.FAILED:
                raise ConflictError(f"Agent {id} is {record.status}; it has not failed.", id=id)
            after = record.model_copy(update={"failures": 0, "restarts": [], "reason": "released"})
            try:
                await self._bucket.replace(id, rpc.encode(after), expected=entry.revision)
            except StaleRevisionError:
                continue
            return AgentInfo.of(after)
        raise ConflictError(f"Agent {id} is being changed by others.", hint="Try again.", id=id)

    async def _record(self, id: str) -> AgentRecord | None:
        entry = await self._bucket.read(id)
        if entry is None or entry.value is None:
            return None
        return rpc.decode(AgentRecord, entry.value)

    def _not_found(self, id: str) -> AgentNotFoundError:
        return AgentNotFoundError(
            f"There is no agent {id!r}.", hint="`foundation agents` lists them.", id=id
        )

    async def get(self, id: str) -> AgentInfo:
        """Where the agent is and how it does, as the registry's leader knows it.

        Raises:
            AgentNotFoundError: there is none of this id.
        """
        record = await self._record(id)
        if record is None:
            raise self._not_found(id)
        return AgentInfo.of(record)

    async def list(
        self,
        *,
        node: str | None = None,
        capability: str | None = None,
        status: str | None = None,
        deployment: str | None = None,
    ) -> builtins.list[AgentInfo]:
        """Every agent that fits, by id."""
        entries = await self._bucket.read_all()
        found = []
        for _, entry in sorted(entries.items()):
            if entry.value is None:
                continue
            info = AgentInfo.of(rpc.decode(AgentRecord, entry.value))
            if (
                (node is None or info.node == node)
                and (capability is None or capability in info.capabilities)
                and (status is None or info.status == status)
                and (deployment is None or info.deployment == deployment)
            ):
                found.append(info)
        return found

    async def by_node(self) -> dict[str | None, builtins.list[AgentInfo]]:
        """Node to its agents, by name and id; None to those that have no node, if there are any.

        A node that has no agents is missing: `cluster.nodes.list` knows all nodes.
        """
        found: dict[str | None, builtins.list[AgentInfo]] = {}
        for info in sorted(
            await self.list(), key=lambda item: (item.node is None, item.node or "")
        ):
            found.setdefault(info.node, []).append(info)
        return found

    async def find(self, capability: str) -> builtins.list[AgentInfo]:
        """Every agent that provides *capability*, by id."""
        return await self.list(capability=capability)

    async def steps(self, id: str) -> builtins.list[StepRecord]:
        """The steps (`ctx.once`) that an agent remembers: those of signals that did not take effect yet.

        Raises:
            AgentNotFoundError: nothing is stored of it.
        """
        entry = await self._state.read(id)
        if entry is None or entry.value is None:
            raise self._not_found(id)
        return rpc.decode(StateRecord, entry.value).steps

    async def resolve_step(
        self,
        id: str,
        key: str,
        *,
        done: bool,
        result: Any = None,
        signal: str | None = None,
        timeout: float = 10.0,
    ) -> StepRecord:
        """Say of a step in doubt whether it was done; the agent has stored it when this returns.

        With *done*, *result* is what the step returns from now on; else it may be begun again.
        The signal, if it was given up for the doubt, still has to be replayed (`cluster.dead`).

        Args:
            signal: the id of its signal, where several have a step of this key.

        Raises:
            NotFoundError: the agent has no such step in doubt, or more than one.
            AgentUnavailableError, AskTimeoutError: the agent did not answer.
        """
        verdict = {"key": key, "signal": signal, "done": done, "result": result}
        said = await self._cluster.ask(id, "foundation.step.resolve", verdict, timeout=timeout)
        return StepRecord.model_validate(said)

    async def history(self, id: str, *, last: int = 50, effects: bool = False) -> History:
        """The newest *last* signals that the agent's mailbox still holds, handled and unread.

        Handled ones stay about a minute, and as many as `mailbox.history` or the class says.

        Args:
            effects: look in all mailboxes for what each has caused to be emitted, too.

        Raises:
            AgentNotFoundError: there is no such agent, and nothing of it.
        """
        return await read_history(self._cluster, id, last=last, effects=effects)

    async def recording(self, id: str) -> Recording:
        """A state that the agent had, and what it has handled since: for `testing.replay`.

        Raises:
            AgentNotFoundError: there is no such agent.
            NotFoundError: it keeps no past (`history`).
        """
        return await read_recording(self._cluster, id)

    async def state(self, id: str) -> dict[str, Any] | None:
        """The stored record of an agent: state, cursor, epoch, commit, outbox; None if none."""
        entry = await self._state.read(id)
        if entry is None or entry.value is None:
            return None
        stored: dict[str, Any] = orjson.loads(entry.value)
        stored.pop("salt", None)
        return stored
