"""Starts worker processes; imports next to nothing, so that they start before their manager is ready.

A worker's imports take as long as its manager's. Spawned first, they overlap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, NamedTuple

from foundation_nats.base.process import die_with_parent
from foundation_nats.node import blackbox

WORKER_MODULE = "foundation_nats.api.worker"
"""What a worker process runs: the composition root of a worker that hosts agents."""
ANSWER = "FOUNDATION_ANSWER"
"""The variable with the number of a pipe to answer by."""


def worker_count(wanted: int | None) -> int:
    """How many workers a node has: what was asked for, else one per core."""
    return wanted if wanted is not None else os.cpu_count() or 1


class Child(NamedTuple):
    """A worker process, and the file that tells what it did when it died."""

    process: subprocess.Popen[bytes]
    box: IO[bytes]


def spawn(module: str = WORKER_MODULE, *, answer: int | None = None) -> Child:
    """Start ``python -m module`` as a child that ends with this process and waits for its orders.

    *answer* is a pipe by which it can say how it got ready (`preparing.py`).
    """
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    box = blackbox.create()
    number = box.fileno()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        blackbox.VARIABLE: str(number),
    }
    if answer is not None:
        environment[ANSWER] = str(answer)
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        pass_fds=(number,) if answer is None else (number, answer),
        # Started from the main thread, which lives as long as the manager: the
        # kernel ties the death signal to the thread that forked.
        preexec_fn=die_with_parent(os.getpid()),
    )
    return Child(process, box)
