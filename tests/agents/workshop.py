"""Agents for tests of blocking and CPU work: they wait, compute, hang and crash."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal as signals
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from foundation_nats import Agent, Signal, State, on

TRACE: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")


def whose() -> tuple[str, str, int]:
    """The thread, the context variable and the process."""
    return threading.current_thread().name, TRACE.get(), os.getpid()


def square(number: int) -> int:
    """Something to compute."""
    return number * number


def crash(number: int) -> None:
    """End the process by a signal."""
    os.kill(os.getpid(), number)


def fail(text: str) -> None:
    """Raise."""
    raise LookupError(text)


def wait(seconds: float) -> int:
    """Block, and say in which process."""
    time.sleep(seconds)
    return os.getpid()


def a_lock() -> object:
    """What can't be pickled."""
    return {"locks": [threading.Lock()]}


@dataclass
class Job:
    """An argument with something in it that can't be pickled."""

    name: str = "job"
    parts: list[Any] = field(default_factory=lambda: [1, threading.Lock()])


class Workshop(Agent):
    """Does what its signals say."""

    class State(State):
        done: list[str] = Field(default_factory=list)

    @on("thread")
    async def thread(self, signal: Signal) -> tuple[str, str, int]:
        TRACE.set("mine")
        return await self.ctx.run_blocking(whose)

    @on("square")
    async def square(self, signal: Signal[int]) -> int:
        return await self.ctx.run_process(square, signal.data)

    @on("crash")
    async def crash(self, signal: Signal) -> None:
        await self.ctx.run_process(crash, int(signals.SIGSEGV))

    @on("raise")
    async def raise_(self, signal: Signal[str]) -> None:
        await self.ctx.run_process(fail, signal.data)

    @on("late")
    async def late(self, signal: Signal[float]) -> str:
        try:
            async with asyncio.timeout(signal.data):
                await self.ctx.run_process(wait, 60)
        except TimeoutError:
            return "late"
        return "in time"

    @on("unfit")
    async def unfit(self, signal: Signal[str]) -> Any:
        match signal.data:
            case "lambda":
                return await self.ctx.run_process(lambda: 1)
            case "argument":
                return await self.ctx.run_process(square, Job())
            case "result":
                return await self.ctx.run_process(a_lock)
            case "coroutine":
                return await self.ctx.run_blocking(asyncio.sleep, 1)

    @on("note")
    async def note(self, signal: Signal[str]) -> list[str]:
        self.state.done.append(signal.data)
        return self.state.done

    @on("block")
    async def block(self, signal: Signal[float]) -> None:
        self.state.done.append("block")
        time.sleep(signal.data)

    @on("block.plain")
    def block_plain(self, signal: Signal[float]) -> None:
        time.sleep(signal.data)

    @on("compute.thread")
    async def compute_in_thread(self, signal: Signal[int]) -> int:
        """The same in a thread."""
        return await self.ctx.run_blocking(pow, 7, signal.data)

    @on("compute")
    async def compute(self, signal: Signal[int]) -> int:
        """Holds the interpreter's lock in native code for as long as it takes."""
        return len(str(pow(7, signal.data) % 10))
