"""Runs a role of a floor module in a process of its own and talks to it in JSON lines.

IO: one child per `Child`, its stdin and stdout. A child ends when it is told to,
when its parent dies (Linux), when its stdin closes, and at the latest by
``SIGALRM`` after `LIFE_MAX_S`: there are no orphans and no endless runs.

Moments are compared across processes with ``time.monotonic_ns()``, which on
Linux and macOS is one clock for the whole machine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import orjson
import uvloop

from foundation_nats.bus.floor.server import FloorError, die_with_parent

LIFE_MAX_S = 120
READ_TIMEOUT_S = 60.0


class Child:
    """A role of a floor module in its own process; always used with ``async with``."""

    def __init__(self, module: str, role: str, url: str, **options: Any) -> None:
        self._command = [
            sys.executable,
            # What lies in the working directory must not stand in for what is installed.
            *(["-P"] if module.startswith("foundation_nats.") else []),
            "-c",
            f"from {module} import ROLES; from foundation_nats.bus.floor.child import serve; serve(ROLES)",
            role,
            orjson.dumps({"url": url, **options}).decode(),
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None
        return self._process.pid

    async def hear(self, timeout_s: float = READ_TIMEOUT_S) -> dict[str, Any]:
        """The child's next report.

        Raises:
            FloorError: the child died or was silent for `timeout_s`.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError:
            raise FloorError(f"{self._command[3]} reported nothing for {timeout_s} s") from None
        if not line:
            raise FloorError(f"{self._command[3]} died (its error is on stderr)")
        return dict(orjson.loads(line))

    def tell(self, **fields: Any) -> None:
        """Send one instruction to the child."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(fields) + b"\n")

    def kill(self) -> None:
        """SIGKILL, without farewell."""
        os.kill(self.pid, signal.SIGKILL)


class Parent:
    """The other end of the pipe, inside the child."""

    def __init__(self) -> None:
        self._lines = asyncio.StreamReader()

    async def connect(self) -> None:
        """Start to read stdin."""
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._lines), sys.stdin
        )

    def report(self, **fields: Any) -> None:
        """Send one report to the parent."""
        sys.stdout.buffer.write(orjson.dumps(fields) + b"\n")
        sys.stdout.buffer.flush()

    async def hear(self) -> dict[str, Any]:
        """The next instruction; the process ends if the parent has gone."""
        line = await asyncio.wait_for(self._lines.readline(), LIFE_MAX_S)
        if not line:
            raise SystemExit(0)
        return dict(orjson.loads(line))


Role = Callable[..., Awaitable[None]]


def serve(roles: dict[str, Role]) -> None:
    """The child's main function: run the role named by argv and then end."""
    signal.alarm(LIFE_MAX_S)
    role, options = roles[sys.argv[1]], orjson.loads(sys.argv[2])

    async def live() -> None:
        parent = Parent()
        await parent.connect()
        await role(parent, **options)

    uvloop.run(live())
