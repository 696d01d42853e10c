"""`Offload`: the threads and the processes in which one worker runs what would block its event loop.

IO: threads, and child processes that speak over their standard input and output
(`offload_child.py`). Both are made when they are first needed, bounded, and shared
by all agents of the worker. Who finds none free waits.

Cancelled (by a time-out, or because its agent is stopped), a call in a process ends
with its process; a thread can't be ended, so it runs on, keeps its place until it is
through, and what it returns is dropped. A process that dies takes one call with it,
and the next call gets a new one. The threads are daemons: one that never ends does
not keep its worker from ending.

Not `concurrent.futures`: there, the death of one process fails the calls of all, a
running call can't be ended, and a thread that hangs keeps the interpreter from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from foundation_nats.agent.offload_child import FAILED, HEADER, NOT_PICKLED
from foundation_nats.errors import ProcessCrashedError
from foundation_nats.node.blackbox import BlackBox

R = TypeVar("R")

THREADS_MAX = 32
_CHILD = "foundation_nats.agent.offload_child"
_EXIT_S = 5.0
_DEPTH_MAX = 6
_BREADTH_MAX = 200


def _ignore(_: int) -> None:
    """Nobody wants to know."""


class _Threads:
    """At most *limit* daemon threads, named ``NAME-0`` …, made as they are needed."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._room = asyncio.Semaphore(limit)
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._busy = 0
        self._threads = 0

    async def run(self, function: Callable[[], R], note: Callable[[int], None] = _ignore) -> R:
        """Call *function* in a thread, as soon as one is free; *note* is told 1 then, -1 at its end."""
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def finish(result: R | None, error: BaseException | None) -> None:
            self._busy -= 1
            self._room.release()
            note(-1)
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def call() -> None:
            result: R | None = None
            error: BaseException | None = None
            try:
                result = function()
            except StopIteration as caught:  # a future can't carry it
                error = RuntimeError(f"it raised StopIteration({caught.value!r})")
                error.__cause__ = caught
            except BaseException as caught:  # whatever it is belongs to who waits for it
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(finish, result, error)

        self._busy += 1
        note(1)
        if self._busy > self._threads:
            name = f"{self._name}-{self._threads}"
            self._threads += 1
            threading.Thread(
                target=self._serve, args=(self._calls,), name=name, daemon=True
            ).start()
        self._calls.put(call)
        return await future

    @staticmethod
    def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
        while (call := calls.get()) is not None:
            call()
            del call  # what it refers to is not kept until the next one comes

    def close(self) -> None:
        """Let every thread end as soon as it is free."""
        for _ in range(self._threads):
            self._calls.put(None)


class _Gone(Exception):
    """The process has ended in the middle of a call."""


class _Child:
    """One child process."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "FOUNDATION_BLACKBOX"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: bytes) -> bytes:
        """Give it a call and wait for the answer; in a thread.

        Raises:
            _Gone: it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(HEADER.pack(len(request)) + request)
            self._process.stdin.flush()
            head = self._process.stdout.read(HEADER.size)
            if len(head) < HEADER.size:
                raise _Gone
            size = HEADER.unpack(head)[0]
            body = self._process.stdout.read(size)
        except (OSError, ValueError) as error:  # a broken pipe; or closed by `end` meanwhile
            raise _Gone from error
        if len(body) < size:
            raise _Gone
        return body

    def end(self) -> int:
        """Kill it, if it lives, and reap it; its exit code."""
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait(_EXIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code

    def how_it_ended(self) -> str:
        """In words, once it has."""
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            code = self.end()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class _Processes:
    """At most *limit* processes, made as they are needed."""

    def __init__(self, limit: int) -> None:
        self._room = asyncio.Semaphore(limit)
        self._threads = _Threads(limit, "foundation-process")
        self._idle: list[_Child] = []
        self._working: set[_Child] = set()

    async def run(self, name: str, request: bytes) -> bytes:
        """The answer to *request*.

        Raises:
            ProcessCrashedError: the process ended before it answered.
        """
        async with self._room:
            child = self._take()
            self._working.add(child)
            try:
                answer = await self._threads.run(lambda: child.exchange(request))
            except _Gone:
                how = child.how_it_ended()
                child.end()
                raise ProcessCrashedError(
                    f"The process that ran {name} ended ({how}) before it had a result.",
                    hint="Signal 9 is often the kernel's, for want of memory; signal 11 a crash in "
                    "native code.",
                    function=name,
                    cause=how,
                ) from None
            except BaseException:
                child.end()
                raise
            finally:
                self._working.discard(child)
            self._idle.append(child)
            return answer

    def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.is_alive:
                return child
            child.end()
        return _Child()

    def close(self) -> None:
        for child in [*self._idle, *self._working]:
            child.end()
        self._idle.clear()
        self._threads.close()


class Offload:
    """Where a worker runs what would block it.

    Args:
        threads_max: for `run_blocking`; more calls wait.
        processes_max: for `run_process`; None: one per core.
        box: told whose calls are in threads.
    """

    def __init__(
        self,
        *,
        threads_max: int = THREADS_MAX,
        processes_max: int | None = None,
        box: BlackBox | None = None,
    ) -> None:
        self._box = box or BlackBox()
        self._threads_max = threads_max
        self._processes_max = processes_max or os.cpu_count() or 1
        self._threads: _Threads | None = None
        self._processes: _Processes | None = None

    async def run_blocking(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call *function* in a thread, with a copy of the caller's context variables.

        Raises:
            TypeError: it is a coroutine function.
        """
        return await self.call_in_thread("", 0, function, args, kwargs)

    async def call_in_thread(
        self,
        agent: str,
        sequence: int,
        function: Callable[..., R],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> R:
        """As `run_blocking`, and for whom: the handler of that signal of *agent*."""
        _check_plain(function, "run_blocking")
        if self._threads is None:
            self._threads = _Threads(self._threads_max, "foundation-blocking")
        context = contextvars.copy_context()
        return await self._threads.run(
            lambda: context.run(function, *args, **kwargs),
            lambda change: self._box.in_thread(agent, sequence, change),
        )

    async def run_process(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call *function* in a process.

        Raises:
            TypeError: the function, an argument or the result can't be pickled; says which and why.
            ProcessCrashedError: the process ended before it had a result.
        """
        _check_plain(function, "run_process")
        name = _name_of(function)
        request = _pickled(function, args, kwargs)
        if self._processes is None:
            self._processes = _Processes(self._processes_max)
        answer = await self._processes.run(name, request)
        kind, body = answer[:1], answer[1:]
        if kind == NOT_PICKLED:
            raise TypeError(body.decode())
        if kind != FAILED:
            result: R = pickle.loads(body)  # noqa: S301 - our own child's
            return result
        error, text = pickle.loads(body)  # noqa: S301 - our own child's
        if not isinstance(error, BaseException):
            error = RuntimeError(error)  # its own class could not be sent
        error.add_note(f"In the process that ran {name}:\n{text}")
        raise error

    async def until_closed(self) -> None:
        """Wait to be cancelled, and end what was started."""
        try:
            await asyncio.Event().wait()
        finally:
            self.close()

    def close(self) -> None:
        """End the processes, and the threads as far as they can be; used again, it starts anew."""
        for part in (self._processes, self._threads):
            if part is not None:
                part.close()
        self._processes = self._threads = None


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else name


def _check_plain(function: Callable[..., Any], what: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{what} is for plain functions; {_name_of(function)} is a coroutine function: await it"
        )


# ---- pickles --------------------------------------------------------------------------


def _pickled(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bytes:
    name = _name_of(function)
    qualname = getattr(function, "__qualname__", "")
    if "<lambda>" in qualname or "<locals>" in qualname:
        raise TypeError(
            f"run_process needs a function that another process can import; {name} is defined "
            "inside another one. Move it to the top of its module"
        )
    if getattr(function, "__module__", "") == "__main__":
        raise TypeError(
            f"run_process needs a function that another process can import; {name} is defined in "
            "the program itself. Move it into a module"
        )
    try:
        return pickle.dumps((function, tuple(args), kwargs), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a user's __reduce__ raises
        parts = [(name, function)]
        parts += [(f"argument {number} of {name}", arg) for number, arg in enumerate(args, start=1)]
        parts += [(f"argument {key!r} of {name}", arg) for key, arg in kwargs.items()]
        for what, part in parts:
            if (why := why_not_pickled(part)) is not None:
                raise TypeError(f"run_process can't hand over {what}{why}") from error
        raise TypeError(f"run_process can't hand over the call of {name}: {error}") from error


def why_not_pickled(value: Any, depth: int = 0) -> str | None:
    """What in *value* can't be pickled, as ``.order.lock: cannot pickle …``; None: all of it can."""
    try:
        pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        if depth < _DEPTH_MAX:
            for path, part in _parts(value)[:_BREADTH_MAX]:
                inner = why_not_pickled(part, depth + 1)
                if inner is not None:
                    return f"{path}{inner}"
        return f" (a {type(value).__qualname__}): {error}"
    return None


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{item.name}", getattr(value, item.name, None)) for item in fields(value)]
    if inspect.ismethod(value):
        return [(".__self__", value.__self__)]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    return [(f".{key}", item) for key, item in vars(value).items()]


__all__ = ["THREADS_MAX", "Offload", "why_not_pickled"]
