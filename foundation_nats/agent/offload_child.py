"""A process that calls functions for a worker, one after the other, until its input ends.

IO. Run as ``python -m foundation_nats.agent.offload_child PID``; imports next to
nothing, so that it starts quickly. What the functions print goes to standard error;
they find an empty standard input. On Linux the kernel ends it with its worker,
whatever it is doing; elsewhere it ends when it next looks for a call.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from typing import IO

HEADER = struct.Struct("!Q")
"""The length of what follows."""
DONE = b"d"
FAILED = b"f"
NOT_PICKLED = b"p"


def answer_to(request: bytes) -> bytes:
    """Make the call, and say what came of it."""
    name = "it"
    try:
        function, args, kwargs = pickle.loads(request)  # noqa: S301 - our own parent's
        name = getattr(function, "__qualname__", name)
        result = function(*args, **kwargs)
    except BaseException as error:  # who asked is told of it, also of an exit
        return FAILED + _packed(error)
    try:
        return DONE + pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        from foundation_nats.agent.offload import why_not_pickled

        why = why_not_pickled(result) or f": {error}"
        return NOT_PICKLED + f"run_process can't hand over what {name} returned{why}".encode()


def _packed(error: BaseException) -> bytes:
    from foundation_nats.base import frames

    text = frames.trace(error)
    if not isinstance(error, Exception):
        return pickle.dumps((f"{type(error).__name__}: {error}", text))
    try:
        packed = pickle.dumps((error, text), pickle.HIGHEST_PROTOCOL)
        pickle.loads(packed)  # noqa: S301 - our own; some can be packed and not unpacked
    except Exception:  # whatever a user's class does
        return pickle.dumps((f"{type(error).__name__}: {error}", text))
    return packed


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer until *source* ends."""
    while len(head := source.read(HEADER.size)) == HEADER.size:
        answer = answer_to(source.read(HEADER.unpack(head)[0]))
        sink.write(HEADER.pack(len(answer)) + answer)
        sink.flush()


def main() -> None:
    """Be such a process."""
    from foundation_nats.base.process import die_with_parent

    die_with_parent(int(sys.argv[1]))()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    try:
        serve(source, sink)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
