"""Processes: children that never outlive their parent, who a pid is, why one has ended."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOG_TAIL_LINES = 4
_RAISED = re.compile(r"(error:|[\w.]*(Error|Exception):) \S")


def process_start(pid: int) -> str | None:
    """A text that differs between two processes of one pid; None: there is no such process.

    A zombie is none. Empty where it can't be known.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _start_by_psutil(pid)
    except OSError:
        return ""
    # The name in parentheses may hold blanks; state is the first field after it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return ""


def log_tail(path: Path) -> str:
    """Why a process ended, as far as its log says: the last error raised, else its last lines."""
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return "it wrote no log"
    lines = [line for line in lines if line]
    raised = [line for line in lines if _RAISED.match(line)]
    return " | ".join(raised[-1:] or lines[-_LOG_TAIL_LINES:]) or "it wrote no log"


def die_with_parent(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec: ask the kernel to kill it when *parent* dies.

    Linux only; elsewhere it does nothing. The kernel ties the signal to the
    thread that forked, so children are started from the main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return prepare
