"""Child processes of a test: started from this repository, read line by line, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.process import die_with_parent

REPOSITORY = Path(__file__).parents[2]


async def connect(url: str, name: str) -> Cluster:
    """For children: connect, although the broker may be dying or starting just now."""
    while True:
        try:
            return await Cluster.connect(url, name=name)
        except FoundationError:
            await asyncio.sleep(0.05)


class Child:
    """``python -m MODULE ARGUMENTS…`` with its output in a file."""

    def __init__(self, module: str, *arguments: str, failpoints: str = "") -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FOUNDATION_FAILPOINTS": failpoints} if failpoints else None,
            preexec_fn=die_with_parent(os.getpid()),
        )

    def lines(self) -> list[str]:
        """What it has printed."""
        # Not `seek`: the place in the file is the child's too, which would write over what it has written.
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace").splitlines()

    def said(self, word: str) -> list[str]:
        """The lines that begin with *word*."""
        return [line for line in self.lines() if line.split(" ", 1)[0] == word]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)


class Children:
    """A ``with`` that kills whatever of its children still runs."""

    def __init__(self) -> None:
        self.all: list[Child] = []

    def start(self, module: str, *arguments: str, failpoints: str = "") -> Child:
        """Start one; *failpoints* as in `foundation_nats.base.failpoint`."""
        child = Child(module, *arguments, failpoints=failpoints)
        self.all.append(child)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self.all:
            child.kill()
            child._log.close()
