"""Who was on a worker's event loop when it died: a few bytes that outlive the process.

The worker writes down, before every step of a handler, which agent's handler
runs on which signal, and wipes it after. The bytes live in an unlinked file
that the manager shares, so a crash in native code, an exit or a SIGKILL leaves
them readable. What awaits is not on the loop: of a thousand agents in the
middle of something, one is named.

A worker that hangs can be asked for its stack (`ask_stack`): a signal handler in native
code writes it to the same file, also while the interpreter's lock is held.

Threads (`ctx.run_blocking`) go on for long, and several at a time: who has calls in them is noted
only while that is one handler, and believed only of a worker that hung with nobody on its loop, as
native code makes it that holds the interpreter's lock in a thread.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile
import types
from collections.abc import Callable, Coroutine, Generator
from typing import IO, Any, NamedTuple, TypeVar

from foundation_nats.base.clock import monotonic

T = TypeVar("T")

VARIABLE = "FOUNDATION_BLACKBOX"
STARTING = -1
"""In place of a signal's sequence: the agent's `on_start`."""
_SIZE = 512
_IN_THREADS = 256
"""Where the second note is."""
_STACK_MAX = 64 * 1024
_ASK = getattr(signal, "SIGUSR2", None)
"""What makes a worker write its stack behind the note."""
_RUN_MAX = 100
_NOBODY = 10  # a line feed: an empty line


class Suspect(NamedTuple):
    """The handler that was running."""

    agent: str
    sequence: int
    """Of the signal in its mailbox; 0: an ask; `STARTING`."""


def importing(run: str) -> Suspect:
    """Who is to blame for an import that ends the process, while no agent is known."""
    return Suspect(run[:_RUN_MAX], STARTING)


def create() -> IO[bytes]:
    """A new file for one worker, gone with its last descriptor."""
    file = tempfile.TemporaryFile(prefix="foundation-box-")  # noqa: SIM115 - its owner closes it
    file.write(2 * b"\n".ljust(_IN_THREADS, b"\0"))
    file.flush()
    return file


def read(file: IO[bytes]) -> Suspect | None:
    """What the worker wrote last; None: no handler was running."""
    return _read(file, 0)


def read_in_threads(file: IO[bytes]) -> Suspect | None:
    """The one handler that had calls in threads; None: there was none, or several."""
    return _read(file, _IN_THREADS)


def _read(file: IO[bytes], place: int) -> Suspect | None:
    line = os.pread(file.fileno(), _IN_THREADS, place).partition(b"\n")[0]
    sequence, _, agent = line.partition(b" ")
    try:
        return Suspect(agent.decode(), int(sequence)) if agent else None
    except ValueError:
        return None


def ask_stack(pid: int) -> None:
    """Make the worker *pid* write down what its main thread is doing; see `read_stack`."""
    if _ASK is not None:
        os.kill(pid, _ASK)


def read_stack(file: IO[bytes]) -> str:
    """What `ask_stack` has brought so far, as `faulthandler` writes it."""
    return os.pread(file.fileno(), _STACK_MAX, _SIZE).decode(errors="replace")


class BlackBox:
    """The worker's side; nothing outlives the process where no manager shares a file."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory
        self._in_threads: dict[tuple[str, int], int] = {}
        self.now: tuple[str, int, float] | None = None
        """Agent and sequence of the handler that is on the event loop, and since when; another object
        at each step, for threads to look at."""

    @classmethod
    def inherited(cls) -> BlackBox:
        """The one that this process was started with."""
        number = os.environ.get(VARIABLE)
        if number is None:
            return cls()
        try:
            box = cls(mmap.mmap(int(number), _SIZE))
            if _ASK is not None:
                faulthandler.register(_ASK, file=int(number), all_threads=False)
        except (OSError, ValueError):
            return cls()
        return box

    def step(
        self, coroutine: Coroutine[Any, Any, T], agent: str, sequence: int
    ) -> tuple[bool, Any]:
        """Run *coroutine* up to its first await: (True, its result), or (False, what it awaits).

        Most handlers await nothing, and are over with this.
        """
        self._enter(agent, sequence)
        try:
            return False, coroutine.send(None)
        except StopIteration as stop:
            return True, stop.value
        finally:
            self._leave()

    @types.coroutine
    def rest(
        self, coroutine: Coroutine[Any, Any, T], awaited: Any, agent: str, sequence: int
    ) -> Generator[Any, Any, T]:
        """Await what is left of *coroutine* after `step`, and note each of its steps."""
        while True:
            error: BaseException | None = None
            value = None
            try:
                value = yield awaited
            except BaseException as caught:
                error = caught
            self._enter(agent, sequence)
            try:
                awaited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                self._leave()

    def call(self, function: Callable[..., T], *arguments: Any, agent: str, sequence: int) -> T:
        """Call a function that is no coroutine."""
        self._enter(agent, sequence)
        try:
            return function(*arguments)
        finally:
            self._leave()

    def in_thread(self, agent: str, sequence: int, change: int) -> None:
        """One more (1) or one less (-1) call of a handler is in a thread."""
        key = (agent, sequence)
        count = self._in_threads.get(key, 0) + change
        if count > 0:
            self._in_threads[key] = count
        else:
            self._in_threads.pop(key, None)
        if self._memory is None:
            return
        if len(self._in_threads) == 1:
            ((agent, sequence),) = self._in_threads
            note = b"%d %b\n" % (sequence, agent.encode())
            self._memory[_IN_THREADS : _IN_THREADS + len(note)] = note
        else:
            self._memory[_IN_THREADS] = _NOBODY

    def _enter(self, agent: str, sequence: int) -> None:
        self.now = (agent, sequence, monotonic())
        if self._memory is not None:
            note = b"%d %b\n" % (sequence, agent.encode())
            self._memory[: len(note)] = note

    def _leave(self) -> None:
        self.now = None
        if self._memory is not None:
            self._memory[0] = _NOBODY
