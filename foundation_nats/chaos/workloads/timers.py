"""Signals that are sent later: by clients, by agents as part of a commit, and again and again; each firing once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic, utc_now
from foundation_nats.chaos.checkers import Judgement, check_effects
from foundation_nats.chaos.history import History, Operation
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    SEND_TIMEOUT_S,
    Workload,
    dead_keys,
    in_parallel,
    states,
)
from foundation_nats.errors import FoundationError, SignalNotFoundError

_AGAIN_S = 0.05
_LATER_S = (0.2, 4.0)
_LATE_S = 1.0
"""What was set by a clock that was further ahead is not waited for."""
_EARLY_MS = 50
"""A firing so much too early may be one that waited for the reading of two clocks."""


class Timers(Workload):
    """Timers set by clients and by agents, and one per agent that repeats."""

    name = "timers"
    functions = ("schedule", "set")
    alarms = 4

    def names(self) -> list[str]:
        """Who is rung."""
        return [f"alarm-{number}" for number in range(self.alarms)]

    def manifest(self) -> list[dict[str, Any]]:
        """The alarms."""
        return [
            {
                "name": "alarm",
                "run": "foundation_nats.chaos.agents:Alarm",
                "replicas": self.alarms,
                "critical": True,
            }
        ]

    def _tick(self, alarm: str) -> str:
        return f"{self.name}.tick.{alarm}"

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """One timer after the other, each until it has a receipt."""
        loops = [
            partial(
                self._set, clients[number % len(clients)], history, stopping, alarm, verb, number
            )
            for number, alarm in enumerate(self.names())
            for verb in self.functions
        ]
        ticks = [partial(self._repeat, clients[0], alarm, stopping) for alarm in self.names()]
        await in_parallel([*loops, *ticks])

    async def _set(
        self,
        client: Cluster,
        history: History,
        stopping: asyncio.Event,
        alarm: str,
        verb: str,
        number: int,
    ) -> None:
        process, count = f"{self.name}.{verb}.{number}", 0
        while not stopping.is_set():
            count += 1
            key = f"{process}.{count}"
            after = self.chance.uniform(*_LATER_S)
            operation = history.invoke(process, verb, f"{alarm}/{verb}", key)
            # No clock of a client is moved: by this one it is told which agents' clocks were.
            operation.by = {"after_s": after, "clock_s": utc_now().timestamp() - monotonic()}
            while True:
                try:
                    data = {"key": key, "after": after}
                    if verb == "set":
                        await client.send(alarm, "alarm.set", data, id=key, timeout=SEND_TIMEOUT_S)
                    else:
                        # Again under the same id, though it may have been stored, or even fired.
                        await client.signals.schedule(
                            alarm, "alarm.ring", data, after=after, id=key, timeout=SEND_TIMEOUT_S
                        )
                except FoundationError as error:
                    if operation.error is None or error.outcome == "unknown":
                        operation.ended(error)
                    if stopping.is_set():
                        return
                    await asyncio.sleep(_AGAIN_S)
                else:
                    operation.ok(by=operation.by)
                    break
            await asyncio.sleep(self.pause_s(0.15))

    async def _repeat(self, client: Cluster, alarm: str, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            with contextlib.suppress(FoundationError):
                await client.signals.schedule(alarm, "alarm.tick", every=0.5, id=self._tick(alarm))
                return
            await asyncio.sleep(_AGAIN_S)

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """What has not rung yet; what repeats is ended."""
        for alarm in self.names():
            with contextlib.suppress(SignalNotFoundError):
                await eye.signals.cancel(self._tick(alarm))
        found, dead = await states(eye, self.names()), await dead_keys(eye)
        done = {
            alarm: {key for key, _ in state.get("rung", ())} | set(dead.get(alarm, ()))
            for alarm, state in found.items()
        }
        for operation in self.mine(history):
            alarm = operation.key.partition("/")[0]
            if operation.outcome == "ok" and operation.value not in done[alarm]:
                if ahead_s(operation, found[alarm]) > _LATE_S:
                    continue
                return f"{alarm} was not rung by {operation.value}"
        return None

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """What was set, what rang and when, and the ticks."""
        return {"states": await states(eye, self.names()), "dead": await dead_keys(eye)}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Each rang once, none too early; no tick came twice."""
        mine = self.mine(history)
        applied: dict[str, list[str]] = {}
        receivers: dict[str, list[str]] = {}
        for alarm, state in found["states"].items():
            applied[f"{alarm} set"] = state.get("set", [])
            applied[f"{alarm} rung"] = [key for key, _ in state.get("rung", ())]
            receivers[f"{alarm}/schedule"] = [f"{alarm} rung"]
            receivers[f"{alarm}/set"] = [f"{alarm} set", f"{alarm} rung"]
            receivers[f"{alarm}/set late"] = [f"{alarm} set"]
            receivers[f"{alarm}/rung late"] = [f"{alarm} rung"]
        dead: dict[str, list[str]] = {}
        for alarm, keys in found["dead"].items():
            dead[f"{alarm} rung"] = keys
            # What was set, and is dead all the same, died when it rang.
            dead[f"{alarm} set"] = [key for key in keys if key not in applied[f"{alarm} set"]]
        rest: list[Operation] = []
        for item in mine:
            alarm = item.key.partition("/")[0]
            if ahead_s(item, found["states"][alarm]) > _LATE_S:
                # Set it was, by a clock that was ahead: it may ring in an hour.
                rest.append(replace(item, key=f"{alarm}/set late"))
                rest.append(replace(item, key=f"{alarm}/rung late", outcome="unknown"))
            else:
                rest.append(item)
        return [
            check_effects(rest, applied, receivers, dead=dead),
            check_moments(found["states"], mine),
        ]


def ahead_s(operation: Operation, state: Mapping[str, Any]) -> float:
    """By how much the agent's clock was ahead of the client's when it set the timer; 0: it didn't, or nobody noted it."""
    clock = state.get("clocks", {}).get(operation.value)
    if clock is None or operation.by is None or "clock_s" not in operation.by:
        return 0.0
    return float(clock - operation.by["clock_s"])


def check_moments(found: Mapping[str, Any], operations: Sequence[Any]) -> Judgement:
    """No ring before its time, reckoned from when it was asked for, and no tick twice.

    What an agent sets is due by its own clock; if that was behind, so much earlier.
    """
    judgement = Judgement("moments", 2)
    due = {
        item.value: item.invoked_ns + int(item.by["after_s"] * 1e9)
        for item in operations
        if item.by is not None
    }
    by_key = {item.value: item for item in operations}
    for alarm, state in found.items():
        for key, at in state.get("rung", ()):
            judgement.looked_at += 1
            ahead = ahead_s(by_key[key], state) if key in by_key else 0.0
            early = (due.get(key, at) - at) / 1e6 + min(0.0, ahead * 1e3)
            if early > _EARLY_MS:
                judgement.violated(f"{alarm} was rung by {key} {early:.0f} ms before its time")
        for tick, count in Counter(state.get("ticks", ())).items():
            judgement.looked_at += 1
            if count > 1:
                judgement.violated(f"{alarm} ticked {count} times as {tick}", "repeated")
    return judgement
