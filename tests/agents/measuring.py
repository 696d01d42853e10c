"""Telemetry handlers that nodes load by the setting ``telemetry.handlers``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_down(event: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """A line in the file that ``MEASURED`` names."""
    line = {"pid": os.getpid(), "event": event, **measurements, **metadata}
    with Path(os.environ["MEASURED"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def fail(event: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """Is of no use."""
    raise RuntimeError("no disk for metrics")


async def wait(event: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """Handlers don't wait."""
