"""`foundation run lock|semaphore|election|counter`: rights that a shell command has while it runs, and a number.

The command is ended before others may take the right over, as far as this process runs: when the right is
lost it gets SIGTERM, and SIGKILL a second later. Whatever must not happen twice takes the token
along, which is in its environment as ``FOUNDATION_TOKEN``.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render, values
from foundation_cli.connection import Output, Shared, connected, run, with_shared

if TYPE_CHECKING:
    import asyncio

    from foundation_nats.coordination import Election, Lock, Semaphore

VARIABLE = "FOUNDATION_TOKEN"
"""What the command finds its fencing token under."""
_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL."""

_Command = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND…", help="Run while the right is ours, and only then."),
]


def _duration(default: str, what: str, *names: str) -> Any:
    return Annotated[
        float,
        typer.Option(
            *names, metavar="DURATION", parser=values.duration, help=what, show_default=default
        ),
    ]


_TTL = "How long others wait after the last sign of a holder that died."


def _needed(command: list[str] | None) -> list[str]:
    if not command:
        raise typer.BadParameter("Say what to run while it is held: -- COMMAND…")
    return command


async def _run_while(command: Sequence[str], token: int, lost: asyncio.Event) -> int | None:
    """Run *command*; returns its exit code, as shells count; None: the right was lost, and it was ended.

    Cancellation ends it too. It is in a session of its own, so that all of it is ended, and dies with us.
    """
    import asyncio

    from foundation_nats.base.process import die_with_parent

    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, VARIABLE: str(token)},
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
    except OSError as error:
        raise typer.BadParameter(f"{command[0]} can't be run: {error.strerror}.") from None
    ending = asyncio.ensure_future(process.wait())
    losing = asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait([ending, losing], return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            await _end(process)
            return None
        code = ending.result()
        return code if code >= 0 else 128 - code
    finally:
        losing.cancel()
        await asyncio.shield(_end(process))
        ending.cancel()


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, then SIGKILL, to it and what it has started."""
    import asyncio
    import contextlib

    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
        # Also what it left behind: the right is over.
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _until_told(main: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run *main*; SIGTERM is as Ctrl-C: the command is ended, and what is held is given back."""
    import asyncio

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None
        is_told = False

        def on_sigterm() -> None:
            nonlocal is_told
            is_told = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm)
        try:
            return await main()
        except asyncio.CancelledError:
            if not is_told:
                raise
            return 128 + signal.SIGTERM

    code = run(guarded)
    if code:
        raise typer.Exit(code)


def _talk(shared: Shared, text: str) -> None:
    if shared.format is Output.TABLE:
        render.talk(text)


async def _hold(
    shared: Shared, mine: Lock | Semaphore, what: str, command: list[str], wait: float
) -> int:
    token = await mine.acquire(timeout=wait)
    try:
        _talk(shared, f"{what} is held, token {token}")
        code = await _run_while(command, token, mine.lost)
    finally:
        await mine.release()
    if code is None:
        from foundation_nats.errors import LockLostError

        raise LockLostError(
            f"{what} was lost, and {command[0]} was ended.", hint="Run it again.", token=token
        )
    return code


@with_shared
def lock(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The lock's name.")],
    command: _Command = None,
    ttl: _duration("10s", _TTL, "--ttl") = "10s",  # type: ignore
    wait: _duration("1m", "How long to wait for it.", "--wait") = "1m",  # type: ignore
    owner: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Who we are, for who asks.")
    ] = None,
) -> None:
    """Run a command while we hold a lock; ends as it ends, with 1 if the lock is not got or lost.

    Its fencing token is in FOUNDATION_TOKEN. If the lock is lost the command is ended.

    Example: foundation run lock nightly --wait 5m -- ./report.sh
    """
    wanted = _needed(command)

    async def main() -> int:
        async with connected(shared) as cluster:
            mine = cluster.leases.lock(name, ttl_s=ttl, owner=owner or _host())
            return await _hold(shared, mine, f"the lock {name}", wanted, wait)

    _until_told(main)


@with_shared
def semaphore(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The semaphore's name.")],
    permits: Annotated[
        int, typer.Option(metavar="N", min=1, help="So many at a time; all must say the same.")
    ],
    command: _Command = None,
    ttl: _duration("10s", _TTL, "--ttl") = "10s",  # type: ignore
    wait: _duration("1m", "How long to wait for a permit.", "--wait") = "1m",  # type: ignore
    owner: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Who we are, for who asks.")
    ] = None,
) -> None:
    """Run a command while we hold one of N permits; ends as it ends, with 1 if there is none, or it is lost.

    Its fencing token is in FOUNDATION_TOKEN. If the permit is lost the command is ended.

    Example: foundation run semaphore gpu --permits 4 -- python train.py
    """
    wanted = _needed(command)

    async def main() -> int:
        async with connected(shared) as cluster:
            mine = cluster.leases.semaphore(name, permits, ttl_s=ttl, owner=owner or _host())
            return await _hold(shared, mine, f"a permit of {name}", wanted, wait)

    _until_told(main)


@with_shared
def election(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The election's name.")],
    candidate: Annotated[
        str, typer.Option("--as", metavar="NAME", help="Who we are, for the others to see.")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND…]", help="Run while we lead, and only then."),
    ] = None,
    value: Annotated[
        str, typer.Option(metavar="TEXT", help="What others shall know, such as an address.")
    ] = "",
    ttl: _duration("15s", _TTL, "--ttl") = "15s",  # type: ignore
) -> None:
    """Stand for leader until told to stop; prints a line when we lead, and when we do no more.

    With a command: run it whenever we lead; it is ended when the tenure is lost, and when it ends by
    itself so do we, as it does. The term is its fencing token, in FOUNDATION_TOKEN.

    Example: foundation run election billing --as host-1 -- ./bill.sh
    """

    async def main() -> int:
        async with connected(shared) as cluster:
            mine = cluster.leases.election(name, candidate=candidate, ttl_s=ttl, value=value)
            return await _lead(shared, mine, name, candidate, command)

    _until_told(main)


async def _lead(
    shared: Shared, mine: Election, name: str, candidate: str, command: list[str] | None
) -> int:
    def tell(state: str, term: int) -> None:
        found = {"election": name, "candidate": candidate, "state": state, "term": term}
        text = f"{candidate} {state} {name} in term {term}"
        if command:
            _talk(shared, text)
        elif shared.format is Output.JSON:
            render.print_line(found)
        else:
            render.write(text)

    try:
        while True:
            term = await mine.campaign()
            tell("leads", term)
            if command:
                code = await _run_while(command, term, mine.lost)
                if code is not None:
                    return code
            else:
                await mine.lost.wait()
            tell("has lost", term)
    finally:
        await mine.resign()


@with_shared
def counter(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The counter's name.")],
    action: Annotated[
        str, typer.Argument(metavar="[value|add]", help="Show it, or add to it.")
    ] = "value",
    amount: Annotated[
        int, typer.Argument(metavar="[N]", help="How much; after -- it may be negative.")
    ] = 1,
    writer: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            help="Who adds; one process of a name at a time. This host's name unless given.",
        ),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="The writer's number of this increment: a repeat counts once."
        ),
    ] = None,
) -> None:
    """Show the value of a counter, or add to it; others that add at the same time are not waited for.

    Example: foundation run counter hits add 3 --as web-1
    """
    if action not in ("value", "add"):
        raise typer.BadParameter(f"{action!r} is neither value nor add.", param_hint="ACTION")

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            mine = cluster.leases.counter(name, writer=writer or _host())
            found: dict[str, Any] = {"counter": name}
            if action == "add":
                found["sequence"] = await mine.add(
                    amount, sequence=sequence, timeout=shared.timeout_s
                )
                found["writer"] = mine.writer
            parts = await mine.writers()
            return {
                **found,
                "value": sum(part.plus - part.minus for part in parts.values()),
                "writers": {who: part.plus - part.minus for who, part in parts.items()},
            }

    found = run(main)
    if shared.format is Output.JSON:
        render.print_line(found)
    elif not render.document(shared, found):
        render.write(str(found["value"]))


def _host() -> str:
    """This host, as a name that may be part of a key."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in socket.gethostname())
    return name.strip("-")[:48] or "cli"


__all__ = ["VARIABLE", "counter", "election", "lock", "semaphore"]
