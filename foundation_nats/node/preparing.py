"""New worker processes that have imported the user's code before anything depends on them.

IO. A worker is spawned, told what to import, and says by a pipe how that went
(`prepare`); then it waits for its orders like any other. So code that can't be
imported is known while the workers with the old code still run, and what imports
take is over before those are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

import orjson

from foundation_nats.base import frames
from foundation_nats.errors import ConfigError
from foundation_nats.node.spawning import ANSWER, Child, spawn

_CHUNK = 64 * 1024


async def prepare(module: str, imports: Sequence[str], *, timeout: float) -> Child:
    """A new worker process that has imported *imports*, each a module or a ``module:Class``.

    Raises:
        ConfigError: one of them can't be imported, or isn't there; names the line. The process has ended.
    """
    reading, writing = os.pipe()
    try:
        child = spawn(module, answer=writing)
    finally:
        os.close(writing)
    try:
        assert child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.process.stdin.write(orjson.dumps({"prepare": list(imports)}) + b"\n")
            child.process.stdin.flush()
        try:
            async with asyncio.timeout(timeout):
                said = await _read_all(reading)
        except TimeoutError:
            raise ConfigError(
                f"Importing {', '.join(imports)} takes longer than {timeout:g} s."
            ) from None
        if not said:
            code = child.process.wait(5)
            raise ConfigError(
                f"Importing {', '.join(imports)} ended the worker process (code {code})."
            )
        answer = orjson.loads(said)
        if answer is not None:
            raise ConfigError(answer["message"], traceback=answer["traceback"])
    except BaseException:
        discard(child)
        raise
    finally:
        os.close(reading)
    return child


def discard(child: Child) -> None:
    """End a worker process that got no orders."""
    child.box.close()
    child.process.kill()
    if child.process.stdin is not None:
        with contextlib.suppress(OSError):
            child.process.stdin.close()
    child.process.wait(5)


async def _read_all(number: int) -> bytes:
    loop = asyncio.get_running_loop()
    os.set_blocking(number, False)
    found = bytearray()
    ended: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        try:
            part = os.read(number, _CHUNK)
        except BlockingIOError:
            return
        found.extend(part)
        if not part and not ended.done():
            ended.set_result(None)

    loop.add_reader(number, on_readable)
    try:
        await ended
    finally:
        loop.remove_reader(number)
    return bytes(found)


def carry_out(line: bytes) -> bool:
    """In the worker: do what *line* asks, if it asks to prepare; whether it does."""
    body = orjson.loads(line)
    if "prepare" not in body:
        return False
    answer = None
    for run in body["prepare"]:
        module, _, name = run.partition(":")
        try:
            found: object = importlib.import_module(module)
            for part in filter(None, name.split(".")):
                found = getattr(found, part, None)
            if found is None:
                answer = {"message": f"module {module!r} has no class {name!r}", "traceback": ""}
                break
        except (Exception, SystemExit) as error:  # whatever a user's module raises
            answer = {
                "message": f"importing {module!r} failed: {frames.summary(error)}",
                "traceback": frames.trace(error),
            }
            break
    number = int(os.environ.pop(ANSWER))
    sys.stdout.flush()
    with os.fdopen(number, "wb") as pipe:
        pipe.write(orjson.dumps(answer))
    return True


__all__ = ["carry_out", "discard", "prepare"]
