"""What is made of the machine for the length of a test: disks, networks.

IO: runs the system's programs. `Scratch` is the ``with`` around it: what was begun is taken
away again, also when it could be made only in part.
"""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Self

_COMMAND_TIMEOUT_S = 20.0


class Scratch:
    """A ``with`` that makes something and takes it away however the block ends."""

    def _make(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Take it away, all or as much as there is. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run_program(*command: str) -> str:
    """What one of the system's programs prints.

    Raises:
        OSError: it failed; says what it said.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND_TIMEOUT_S,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise OSError(f"{' '.join(command)}: {said}")
    return done.stdout


__all__ = ["Scratch", "run_program"]
