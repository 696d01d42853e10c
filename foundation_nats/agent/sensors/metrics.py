"""`HostMetrics`: how busy the machine is where the agent runs, by psutil."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil

from foundation_nats.agent.sensors.sensor import Sensor
from foundation_nats.errors import ConfigError


class HostMetrics(Sensor):
    """``HostMetrics(every=10, emit="host")``: cpu, memory, load and disk, in percent and bytes.

    Args:
        when: whether to emit these figures; None: always. ``when=lambda m: m["cpu_percent"] > 90``.
        disk: the file system of this path.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        *,
        every: float = 10.0,
        when: Callable[[dict[str, Any]], bool] | None = None,
        disk: str = "/",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if every <= 0:
            raise ConfigError(f"HostMetrics {self.name}: every must be positive")
        self.every = every
        self.when = when
        self.disk = disk

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        psutil.cpu_percent(None)  # since then
        while True:
            await self.here.sleep(self.every)
            found = self._figures()
            if self.when is None or self.when(found):
                yield found

    def _figures(self) -> dict[str, Any]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self.disk)
        return {
            "node": self.here.node,
            "cpu_percent": psutil.cpu_percent(None),
            "cpus": psutil.cpu_count() or 1,
            "load": list(psutil.getloadavg()),
            "memory_percent": memory.percent,
            "memory_available": memory.available,
            "disk_percent": disk.percent,
            "disk_free": disk.free,
        }


__all__ = ["HostMetrics"]
