"""Starts worker processes; imports next to nothing, so that they start before their manager is ready.

A worker's imports take as long as its manager's. Spawned first, they overlap.
"""

from __future__ import annotations

import os
import subprocess
import sys

from foundation_nats.base.process import die_with_parent

WORKER_MODULE = "foundation_nats.api.worker"
"""What a worker process runs: the composition root of a worker that hosts agents."""


def worker_count(wanted: int | None) -> int:
    """How many workers a node has: what was asked for, else one per core."""
    return wanted if wanted is not None else os.cpu_count() or 1


def spawn(module: str = WORKER_MODULE) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` as a child that ends with this process and waits for its orders."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        # Started from the main thread, which lives as long as the manager: the
        # kernel ties the death signal to the thread that forked.
        preexec_fn=die_with_parent(os.getpid()),
    )
