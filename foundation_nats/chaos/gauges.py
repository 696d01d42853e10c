"""Samples what must not grow: memory, descriptors, threads and tasks of every process, sizes of every stream.

IO; reads only. A process that was restarted is another process, hence another series.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict

import psutil

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.bus import rpc
from foundation_nats.bus.streams import api
from foundation_nats.chaos.attached import Attached
from foundation_nats.chaos.checkers import Allowance, Series
from foundation_nats.chaos.lab import Lab
from foundation_nats.errors import FoundationError
from foundation_schemas import InspectReply

ALLOWED = {
    # Allocators give back late and in steps; a leak of 1 KB a second shows in an hour.
    "MB": Allowance(share=0.15, absolute=8.0),
    # The server's collector lets its heap double, and keeps pools of 8 MB buffers: what lives in it
    # was 45 and 42 MB after one and two and a half minutes in which the process grew from 92 to 157 MB.
    "broker MB": Allowance(share=1.0, absolute=64.0),
    "descriptors": Allowance(share=0.2, absolute=8),
    "threads": Allowance(share=0.2, absolute=4),
    "tasks": Allowance(share=0.2, absolute=16),
    "stream MB": Allowance(share=0.3, absolute=8.0),
}
"""By unit: what may be gained after the warm-up."""

_INSPECT_TIMEOUT_S = 2.0


class Gauges:
    """Samples until cancelled; what it has is in `series`."""

    def __init__(self, lab: Lab | Attached, *, every_s: float) -> None:
        self._lab = lab
        self._every_s = every_s
        self._samples: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    def series(self) -> list[Series]:
        """Everything sampled so far."""
        return [Series(name, unit, found) for (name, unit), found in sorted(self._samples.items())]

    async def run(self) -> None:
        """Take a sample now and then."""
        while True:
            at = monotonic()
            for name, process in self._processes():
                self._look_at(at, name, process)
            await self._inspect(at, self._lab.eye)
            await self._measure_streams(at, self._lab.eye)
            await asyncio.sleep(self._every_s)

    def _processes(self) -> list[tuple[str, psutil.Process]]:
        found = []
        for name in self._lab.names:
            for index, process in enumerate(self._lab.node(name).family()):
                role = f"worker {index}" if index else "manager"
                found.append((f"{name} {role}", process))
        if isinstance(self._lab, Lab):
            for index, server in enumerate(self._lab.servers, 1):
                if server.is_running:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.append((f"broker {index}", psutil.Process(server.pid)))
        return found

    def _look_at(self, at: float, name: str, process: psutil.Process) -> None:
        label = f"{name} (pid {process.pid})"
        with contextlib.suppress(psutil.Error):
            with process.oneshot():
                memory = process.memory_info().rss / 1e6
                threads = process.num_threads()
                descriptors = process.num_fds()
            unit = "broker MB" if name.startswith("broker ") else "MB"
            self._note(at, f"{label} memory", unit, memory)
            self._note(at, f"{label} threads", "threads", threads)
            self._note(at, f"{label} files", "descriptors", descriptors)

    async def _inspect(self, at: float, eye: Cluster) -> None:
        for name in self._lab.names:
            subject = eye.subjects.control_node(name, "inspect")
            with contextlib.suppress(FoundationError):
                reply = await rpc.call(
                    eye.bus, subject, None, InspectReply, timeout=_INSPECT_TIMEOUT_S
                )
                parts = {"manager": reply.details, **reply.details}
                for part, details in parts.items():
                    if isinstance(details, dict) and "tasks" in details:
                        label = f"{name} {part} (pid {details['pid']}) tasks"
                        self._note(at, label, "tasks", float(details["tasks"]))

    async def _measure_streams(self, at: float, eye: Cluster) -> None:
        with contextlib.suppress(FoundationError):
            found = await api(eye.bus, "STREAM.LIST")
            for stream in found.get("streams") or []:
                size = stream["state"]["bytes"] / 1e6
                self._note(at, f"stream {stream['config']['name']}", "stream MB", size)

    def _note(self, at: float, name: str, unit: str, value: float) -> None:
        self._samples[name, unit].append((at, value))
