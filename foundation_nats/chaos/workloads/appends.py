"""List-append, pipelines and fan-out: every key that was receipted is applied once by everybody who must.

All three leave lists of keys in states, and share their judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_effects, check_order
from foundation_nats.chaos.history import History, Operation
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    Workload,
    dead_keys,
    in_parallel,
    send_until_receipted,
    states,
)


class _Lists(Workload):
    """Senders that each send one key after the other to one target."""

    kind = ""
    """The signal's type."""
    senders_per_target = 1
    base_pause_s = 0.04

    def targets(self) -> list[str]:
        """Where signals are sent."""
        raise NotImplementedError

    def receivers(self) -> dict[str, list[str]]:
        """Target to everybody who must apply what is sent to it."""
        raise NotImplementedError

    def payload(self, key: str) -> dict[str, Any]:
        """The data of the signal that carries *key*."""
        return {"key": key}

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """One signal after the other, each until it has a receipt."""
        loops = []
        for number, target in enumerate(self.targets()):
            for sender in range(self.senders_per_target):
                process = f"{self.name}.{number}.{sender}"
                client = clients[(number + sender) % len(clients)]
                loops.append(partial(self._send, client, history, stopping, process, target))
        await in_parallel(loops)

    async def _send(
        self,
        client: Cluster,
        history: History,
        stopping: asyncio.Event,
        process: str,
        target: str,
    ) -> None:
        count = 0
        while not stopping.is_set():
            count += 1
            key = f"{process}.{count}"
            done = await send_until_receipted(
                client, history, stopping, process, target, self.kind, self.payload(key), key
            )
            if not done:
                return
            await asyncio.sleep(self.pause_s(self.base_pause_s))

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Which receipted keys are neither applied nor dead yet."""
        receivers = self.receivers()
        everybody = sorted({agent for group in receivers.values() for agent in group})
        applied = await states(eye, everybody)
        buried = await dead_keys(eye)
        wanted: dict[str, set[str]] = {}
        for operation in self.mine(history):
            if operation.outcome == "ok":
                for agent in receivers[operation.key]:
                    wanted.setdefault(agent, set()).add(operation.value)
        for agent, keys in wanted.items():
            lacking = keys - set(applied[agent].get("applied", ())) - set(buried.get(agent, ()))
            if lacking:
                return f"{agent} lacks {len(lacking)} of {len(keys)}, such as {min(lacking)}"
        return None

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """Everybody's list, and the dead letters."""
        everybody = sorted({agent for group in self.receivers().values() for agent in group})
        return {"states": await states(eye, everybody), "dead": await dead_keys(eye)}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Exactly once, in each sender's order."""
        receivers = self.receivers()
        applied = {agent: state.get("applied", []) for agent, state in found["states"].items()}
        mine = self.mine(history)
        return [
            check_effects(mine, applied, receivers, dead=found["dead"]),
            check_order(mine, applied, receivers),
        ]


class Appends(_Lists):
    """Ledgers that append keys to a list in their state and emit each to a mirror."""

    name = "appends"
    functions = ("send",)
    kind = "chaos.append"
    senders_per_target = 2
    ledgers = 16

    def targets(self) -> list[str]:
        """The ledgers."""
        return [f"ledger-{number}" for number in range(self.ledgers)]

    def receivers(self) -> dict[str, list[str]]:
        """The ledger, and its mirror because of it."""
        return {name: [name, f"mirror-{name}"] for name in self.targets()}

    def manifest(self) -> list[dict[str, Any]]:
        """Ledgers and mirrors."""
        return [
            {
                "name": "ledger",
                "run": "foundation_nats.chaos.agents:Ledger",
                "replicas": self.ledgers,
                "critical": True,
                "config": {"mirror": "mirror-{}"},
            },
            {
                "name": "mirror-ledger",
                "run": "foundation_nats.chaos.agents:Ledger",
                "replicas": self.ledgers,
                "critical": True,
            },
        ]


class Pipeline(_Lists):
    """Three stages in a row; each item passes each once."""

    name = "pipeline"
    functions = ("send",)
    kind = "pipeline.item"
    base_pause_s = 0.02
    lines = 4

    def targets(self) -> list[str]:
        """The first stages."""
        return [f"stage-a-{number}" for number in range(self.lines)]

    def receivers(self) -> dict[str, list[str]]:
        """All three stages of the line."""
        return {
            f"stage-a-{number}": [f"stage-{letter}-{number}" for letter in "abc"]
            for number in range(self.lines)
        }

    def payload(self, key: str) -> dict[str, Any]:
        """An item."""
        return {"key": key, "worth": 1}

    def manifest(self) -> list[dict[str, Any]]:
        """Three deployments, one replica per line."""
        run = "foundation_nats.chaos.agents:Stage"
        return [
            {
                "name": f"stage-{letter}",
                "run": run,
                "replicas": self.lines,
                "critical": True,
                **({"config": {"next": f"stage-{following}"}} if following else {}),
            }
            for letter, following in (("a", "b"), ("b", "c"), ("c", ""))
        ]


class Fanout(_Lists):
    """Signals to all providers of a capability; each of them applies each once."""

    name = "fanout"
    functions = ("send",)
    kind = "chaos.append"
    base_pause_s = 0.05
    listeners = 6

    def targets(self) -> list[str]:
        """The capability, and the deployment behind it."""
        return ["capability:chaos-listening", "deployment:listener"]

    def receivers(self) -> dict[str, list[str]]:
        """Everybody, for both."""
        listeners = [f"listener-{number}" for number in range(self.listeners)]
        return dict.fromkeys(self.targets(), listeners)

    def manifest(self) -> list[dict[str, Any]]:
        """The listeners."""
        return [
            {
                "name": "listener",
                "run": "foundation_nats.chaos.agents:Ledger",
                "replicas": self.listeners,
                "critical": True,
                "capabilities": ["chaos-listening"],
            }
        ]

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Exactly once; no order is promised across an expansion."""
        return super().judge(found, history, seen)[:1]


class Rings(_Lists):
    """Tokens that go round a ring of agents, which each emit because of the one before."""

    name = "ring"
    functions = ("send",)
    kind = "ring.token"
    base_pause_s = 0.4
    stations = 5
    hops = 12

    def targets(self) -> list[str]:
        """Where tokens begin."""
        return [f"station-{number}" for number in range(0, self.stations, 2)]

    def receivers(self) -> dict[str, list[str]]:
        """Everybody: a token goes round twice."""
        return dict.fromkeys(self.targets(), self._stations())

    def _stations(self) -> list[str]:
        return [f"station-{number}" for number in range(self.stations)]

    def payload(self, key: str) -> dict[str, Any]:
        """A token."""
        return {"key": key, "hop": 0, "last": self.hops - 1, "size": self.stations}

    def manifest(self) -> list[dict[str, Any]]:
        """The stations."""
        return [
            {
                "name": "station",
                "run": "foundation_nats.chaos.agents:Station",
                "replicas": self.stations,
                "critical": True,
            }
        ]

    def _by_hop(self, history: History) -> list[Operation]:
        """Each token's sending as so many, one for each station that it passes."""
        found = []
        for item in self.mine(history):
            first = int(item.key.rpartition("-")[2])
            for hop in range(self.hops):
                station = f"station-{(first + hop) % self.stations}"
                found.append(replace(item, key=station, value=f"{item.value}/{hop}"))
        return found

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Which token has not gone its way."""
        found = await states(eye, self._stations())
        passed = {station: set(state.get("applied", ())) for station, state in found.items()}
        for item in self._by_hop(history):
            if item.outcome == "ok" and item.value not in passed[item.key]:
                return f"{item.value} has not passed {item.key}"
        return None

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every hop of every token once."""
        applied = {agent: state.get("applied", []) for agent, state in found["states"].items()}
        receivers = {station: [station] for station in self._stations()}
        return [check_effects(self._by_hop(history), applied, receivers)]
