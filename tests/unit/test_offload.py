"""Work that would block a worker: threads and processes of an agent, without a server."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import psutil
import pytest

from foundation_nats.agent.offload import Offload
from foundation_nats.errors import HandlerError, ProcessCrashedError
from foundation_nats.testing import AgentHarness, eventually
from tests.agents import workshop
from tests.agents.workshop import Workshop, wait


async def test_a_blocking_call_runs_in_a_thread_with_the_callers_context() -> None:
    """Named, in this process, with a copy of the context variables."""
    async with AgentHarness(Workshop) as agent:
        name, trace, pid = await agent.ask("thread")
        assert name.startswith("foundation-blocking-")
        assert (trace, pid) == ("mine", os.getpid())


async def test_threads_are_bounded_and_one_that_is_given_up_keeps_its_place() -> None:
    """Two at a time; a cancelled call goes on in its thread, and the next waits for it."""
    offload = Offload(threads_max=2)
    gate = threading.Event()
    began: list[int] = []

    def hold(number: int) -> int:
        began.append(number)
        gate.wait(10)
        return number

    tasks = [asyncio.create_task(offload.run_blocking(hold, n)) for n in range(4)]
    await eventually(lambda: len(began) == 2, message="two have begun")
    tasks[0].cancel()
    await asyncio.sleep(0.05)
    assert began == [0, 1]
    gate.set()
    assert await asyncio.wait_for(asyncio.gather(*tasks[1:]), 5) == [1, 2, 3]
    assert tasks[0].cancelled()
    offload.close()


async def test_a_process_computes_and_is_kept_for_the_next_call() -> None:
    """It ends with the agent."""
    async with AgentHarness(Workshop) as agent:
        assert await agent.ask("square", 12) == 144
        (child,) = psutil.Process().children()
        assert await agent.ask("square", 13) == 169
        assert psutil.Process().children() == [child]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_a_process_that_crashes_is_named_and_replaced() -> None:
    """One call fails, the next gets a new process."""
    async with AgentHarness(Workshop) as agent:
        with pytest.raises(
            ProcessCrashedError, match=r"ran .*workshop\.crash ended \(killed by signal 11\)"
        ):
            await agent.ask("crash")
        assert await agent.ask("square", 3) == 9


async def test_what_raises_in_a_process_raises_here_and_shows_the_line_there() -> None:
    """The same class, and the traceback of the other process as a note."""
    async with AgentHarness(Workshop) as agent:
        with pytest.raises(HandlerError, match="LookupError: no such order") as caught:
            await agent.ask("raise", "no such order")
        text = caught.value.details["traceback"]
        assert "in fail" in text
        assert "raise LookupError(text)" in text


async def test_a_call_that_is_too_late_ends_with_its_process() -> None:
    """A time-out kills what a thread could only abandon."""
    async with AgentHarness(Workshop) as agent:
        began = time.monotonic()
        assert await agent.ask("late", 0.2) == "late"
        assert time.monotonic() - began < 3
        assert not psutil.Process().children()
        assert await agent.ask("square", 2) == 4


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("lambda", r"needs a function that another process can import"),
        ("argument", r"argument 1 of .*square\.parts\[1\] \(a lock\): cannot pickle"),
        ("result", r"what a_lock returned\['locks'\]\[0\] \(a lock\): cannot pickle"),
        ("coroutine", r"run_blocking is for plain functions; .*sleep is a coroutine function"),
    ],
)
async def test_what_cannot_be_handed_over_is_named(what: str, says: str) -> None:
    """Function, argument or result, and the part of it that is to blame."""
    async with AgentHarness(Workshop) as agent:
        with pytest.raises(HandlerError, match=f"TypeError: .*{says}"):
            await agent.ask("unfit", what)


async def test_processes_are_bounded_and_a_crash_touches_no_other_call() -> None:
    """Of two at a time one is killed: the other goes on, and so do those that wait."""
    offload = Offload(processes_max=2)
    try:
        tasks = [asyncio.create_task(offload.run_process(wait, 0.3)) for _ in range(3)]
        children = await eventually(
            lambda: found if len(found := psutil.Process().children()) == 2 else None,
            message="two processes",
        )
        assert children is not None
        children[0].kill()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(item, ProcessCrashedError) for item in results) == 1
        assert sum(isinstance(item, int) for item in results) == 2
        assert workshop.square(2) == await offload.run_process(workshop.square, 2)
    finally:
        offload.close()
