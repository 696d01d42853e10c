"""`AgentTools`: the actions of running agents as tools of an MCP server.

One tool for each action of each deployment, or of each agent that stands alone:
``agent__<deployment>__<action>``. Where a deployment has several agents, an argument says which of them shall do
it. Schemas are those that the agents themselves tell (`foundation_nats.agent.tools`).
"""

from __future__ import annotations

import asyncio
import builtins
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pydantic import ValidationError

from foundation_nats.agent.actions.catalogue import CATALOGUE, PREFIX
from foundation_nats.agent.tools import Tool
from foundation_nats.api.cluster import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.errors import ConfigError, FoundationError
from foundation_nats.gateways.prompting import Prompter
from foundation_nats.gateways.roster import Listed, Roster

NAME_MAX = 64
"""What the pickiest clients take."""
_FRESH_S = 30.0
_ASK_S = 3.0
_TRIES = 3
_AGENT = "agent"


@dataclass(frozen=True, slots=True)
class _Offer:
    """One action of one family of agents."""

    name: str
    tool: Tool
    target: str
    members: tuple[str, ...]
    argument: str | None
    """What names the agent; None: there is but one."""

    def listed(self) -> dict[str, Any]:
        found = copy.deepcopy(self.tool.mcp())
        found["name"] = self.name
        found["title"] = f"{self.tool.name} ({self.target})"
        if self.argument is not None:
            some = ", ".join(self.members[:5])
            found["inputSchema"].setdefault("properties", {})[self.argument] = {
                "type": "string",
                "description": f"Which agent shall do it, such as {some}; any that runs unless given.",
            }
        return found


class AgentTools:
    """The tools; `open` it before they are listed or called."""

    def __init__(
        self,
        cluster: Cluster,
        only: Collection[str] = (),
        *,
        patience_s: float = 10.0,
        answer_s: float = 120.0,
    ) -> None:
        """*only*: agents, ``deployment:NAME`` or ``capability:NAME``; empty: all.

        Raises:
            ConfigError: one of them is none.
        """
        self._cluster = cluster
        self._roster = Roster(cluster, only, providing=None)
        self._prompter = Prompter(cluster, patience_s=patience_s, answer_s=answer_s)
        self._known: dict[str, tuple[float, builtins.list[Tool]]] = {}
        """By class: when it was asked, and its tools."""
        self._scope: TaskScope | None = None
        self._log = get_logger("gateway").bind(protocol="mcp")

    async def open(self) -> None:
        """Follow the registry until `close`.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        self._scope = TaskScope("agent-tools")
        await self._roster.open(self._scope)

    async def close(self) -> None:
        """End it. Idempotent."""
        if self._scope is not None:
            await self._scope.close()

    async def list(self) -> Sequence[Mapping[str, Any]]:
        """As MCP lists them, by name."""
        offers = await self._offers()
        return [offers[name].listed() for name in sorted(offers)]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the action returns: its object, or ``{"result": …}``.

        Raises:
            KeyError: there is no such tool.
            FoundationError: the agent's error, or that it was not there, or did not answer.
        """
        offer = (await self._offers())[name]
        given = dict(arguments)
        target = offer.target
        if offer.argument is not None and (agent := given.pop(offer.argument, None)) is not None:
            if agent not in offer.members:
                raise ConfigError(
                    f"{agent!r} is not of {offer.target}.",
                    hint=f"It has: {', '.join(offer.members[:20])}.",
                )
            target = str(agent)
        result = await self._prompter.ask(target, PREFIX + offer.tool.name, given)
        return result if isinstance(result, dict) else {"result": result}

    async def _offers(self) -> dict[str, _Offer]:
        families: dict[tuple[str, str], builtins.list[Listed]] = {}
        for item in self._roster.all():
            if any(type.startswith(PREFIX) for type in item.handles):
                families.setdefault((item.family, item.run), []).append(item)
        by_run: dict[str, builtins.list[str]] = {}
        for (_, run), items in families.items():
            by_run.setdefault(run, []).extend(item.id for item in items)
        told = await asyncio.gather(*(self._ask(run, ids) for run, ids in by_run.items()))
        tools = dict(zip(by_run, told, strict=True))
        found: dict[str, _Offer] = {}
        for (family, run), items in families.items():
            members = tuple(item.id for item in items)
            whole = items[0].deployment is not None and members != (family,)
            for tool in tools[run]:
                argument = None
                if whole:
                    taken = tool.params.get("properties", {})
                    argument = _AGENT if _AGENT not in taken else f"{_AGENT}_id"
                name = tool_name(family, tool.name)
                target = f"deployment:{family}" if whole else members[0]
                found[name] = _Offer(name, tool, target, members, argument)
        return found

    async def _ask(self, run: str, ids: Sequence[str]) -> builtins.list[Tool]:
        """What the agents of a class can do, as one of them says it; what it said last if none answers."""
        at, known = self._known.get(run, (-_FRESH_S, []))
        if monotonic() - at < _FRESH_S and known:
            return known
        for id in ids[:_TRIES]:
            try:
                said = await self._cluster.ask(id, CATALOGUE, timeout=_ASK_S)
                known = [Tool.model_validate(item) for item in said]
            except (FoundationError, ValidationError, TypeError) as error:
                self._log.info("agent does not say what it can do", agent=id, error=str(error))
                continue
            self._known[run] = monotonic(), known
            break
        return known


def tool_name(family: str, action: str) -> str:
    """A name that stays as it is, whoever else there is."""
    name = f"agent__{family}__{action}"
    if len(name) <= NAME_MAX and "__" not in family + action:
        return name
    mark = blake2b(f"{family} {action}".encode(), digest_size=4).hexdigest()
    return f"{name[: NAME_MAX - 9]}_{mark}"


__all__ = ["AgentTools", "tool_name"]
