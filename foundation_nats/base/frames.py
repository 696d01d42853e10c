"""Errors and stacks as the person who wrote an agent wants to read them: their line first, ours left out.

Pure, but for the source lines, which come from files (`linecache`).

The user's frame is the deepest one in their own code: neither this platform's,
nor the standard library's, nor that of an installed package, unless the agent
itself was installed. What is left out are the frames of this platform on the
way there; where nothing else is left, nothing is left out. With
``FOUNDATION_TRACEBACKS=full`` nothing ever is.
"""

from __future__ import annotations

import linecache
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import FrameType, TracebackType
from typing import NamedTuple

TRACE_MAX = 8000
"""Characters of a trace that travels."""
_LINE_MAX = 200
_CHAIN_MAX = 5
_OURS = ("foundation_nats", "foundation_schemas", "foundation_cli")
_FAULT = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OUR_ROOT = os.path.dirname(_HERE)


class Frame(NamedTuple):
    """One line of code that was running."""

    file: str
    line: int
    name: str
    """The function, with its class where that is known."""

    @property
    def source(self) -> str:
        """The line itself, without its indent; empty where the file can't be read."""
        linecache.checkcache(self.file)
        return linecache.getline(self.file, self.line).strip()[:_LINE_MAX]

    @property
    def place(self) -> str:
        """``counter.py:14 in Counter.add``, relative to the working directory where it is below it."""
        return f"{_short(self.file)}:{self.line} in {self.name}"


class _Kind(NamedTuple):
    is_ours: bool
    is_library: bool
    package: str


def _short(file: str) -> str:
    here = os.getcwd() + os.sep
    return file[len(here) :] if file.startswith(here) else file


@lru_cache(maxsize=1)
def _library_roots() -> tuple[str, ...]:
    found = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found.update(site.getsitepackages())
    found.add(site.getusersitepackages())
    # Links of virtual environments: files are named as they were imported.
    found.update({os.path.realpath(path) for path in found if path})
    return tuple(sorted((path + os.sep for path in found if path), key=len, reverse=True))


@lru_cache(maxsize=4096)
def _kind(file: str) -> _Kind:
    for package in _OURS:
        inside = f"{os.sep}{package}{os.sep}"
        if inside in file and (file.startswith(_OUR_ROOT + os.sep) or "site-packages" in file):
            return _Kind(True, False, package)
    if file.startswith("<frozen ") or not file:
        return _Kind(False, True, "")
    for root in _library_roots():
        if file.startswith(root):
            return _Kind(False, True, file[len(root) :].partition(os.sep)[0])
    return _Kind(False, False, "")


def user_frame(frames: Sequence[Frame]) -> Frame | None:
    """The deepest of *frames* (outermost first) that is the user's own code; None: there is none."""
    for frame in reversed(frames):
        kind = _kind(frame.file)
        if not kind.is_ours and not kind.is_library:
            return frame
    # All of it is installed: whoever we called is the agent, and so is its package.
    others = [frame for frame in frames if not _kind(frame.file).is_ours]
    if not others:
        return None
    package = next((k.package for f in others if (k := _kind(f.file)).package), "")
    mine = [frame for frame in others if _kind(frame.file).package == package]
    return (mine or others)[-1]


def without_ours(frames: Sequence[Frame]) -> list[Frame]:
    """*frames* but for those of this platform; all of them where nothing else is left."""
    kept = [frame for frame in frames if not _kind(frame.file).is_ours]
    if not kept or os.environ.get("FOUNDATION_TRACEBACKS") == "full":
        return list(frames)
    while len(kept) > 1 and _is_plumbing(kept[0]):
        del kept[0]
    return kept


def _is_plumbing(frame: Frame) -> bool:
    """The event loop and threads, which carry our frames and the user's."""
    return _kind(frame.file).is_library and (
        _kind(frame.file).package.removesuffix(".py")
        in ("asyncio", "uvloop", "threading", "concurrent", "contextvars", "runpy", "importlib", "")
        or frame.file.startswith("<frozen ")
    )


# ---- of errors ----------------------------------------------------------------------


def of_traceback(trace: TracebackType | None) -> list[Frame]:
    """The frames of an exception's traceback, outermost first."""
    return [
        Frame(frame.f_code.co_filename, line, _name(frame))
        for frame, line in traceback.walk_tb(trace)
    ]


def of_stack(frame: FrameType | None) -> list[Frame]:
    """The frames of a stack that is running, outermost first."""
    found = [
        Frame(item.f_code.co_filename, line, _name(item))
        for item, line in traceback.walk_stack(frame)
    ]
    return found[::-1]


def of_fault(text: str) -> list[Frame]:
    """The frames in what `faulthandler` has written of the first thread, outermost first."""
    found: list[Frame] = []
    for line in text.splitlines():
        match = _FAULT.match(line)
        if match is not None:
            found.append(Frame(match["file"], int(match["line"]), match["name"]))
        elif found:
            break
    return found[::-1]


def _name(frame: FrameType) -> str:
    return str(getattr(frame.f_code, "co_qualname", frame.f_code.co_name))


def where(error: BaseException) -> str:
    """Where in the user's code *error* arose: ``counter.py:14 in Counter.add``; empty if nowhere."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{_short(error.filename)}:{error.lineno}"
    frame = user_frame(of_traceback(error.__traceback__))
    return "" if frame is None else frame.place


def summary(error: BaseException) -> str:
    """``RuntimeError: no such order (orders.py:14 in Orders.find)``."""
    text = str(error)
    if isinstance(error, SyntaxError):
        text = error.msg or text
    name = type(error).__name__
    said = f"{name}: {text}" if text else name
    place = where(error)
    return f"{said} ({place})" if place else said


def trace(error: BaseException, limit: int = TRACE_MAX) -> str:
    """The traceback of *error* for the person who wrote the agent: its place first, then the way there.

    Causes are told as Python does, each without our frames. At most *limit* characters; what is
    left out is in the middle.
    """
    found = of_traceback(error.__traceback__)
    frame = user_frame(found)
    if frame is None or isinstance(error, SyntaxError):
        return _cut(trimmed(error), limit)
    source = frame.source
    head = f"{frame.place}" + (f"\n    {source}" if source else "") + "\n"
    if without_ours(found) == [frame] and not _has_more(error):
        return _cut(head + "".join(traceback.format_exception_only(error)).rstrip("\n"), limit)
    return _cut(f"{head}{_said(error)}\n{trimmed(error)}", limit)


def trimmed(error: BaseException) -> str:
    """The traceback of *error* in Python's own form, without our frames."""
    return "\n".join(_chain(error, _CHAIN_MAX))


def _has_more(error: BaseException) -> bool:
    """Whether others led to it, or are in it."""
    before = None if error.__suppress_context__ else error.__context__
    return bool(error.__cause__ or before or isinstance(error, BaseExceptionGroup))


def _chain(error: BaseException, left: int) -> list[str]:
    before: list[str] = []
    if left > 0:
        if error.__cause__ is not None:
            before = [
                *_chain(error.__cause__, left - 1),
                "",
                "The above exception was the direct cause of the following exception:",
                "",
            ]
        elif error.__context__ is not None and not error.__suppress_context__:
            before = [
                *_chain(error.__context__, left - 1),
                "",
                "During handling of the above exception, another exception occurred:",
                "",
            ]
    frames = without_ours(of_traceback(error.__traceback__))
    lines = ["Traceback (most recent call last):", *listing(frames)] if frames else []
    lines += [line.rstrip("\n") for line in traceback.format_exception_only(error)]
    if isinstance(error, BaseExceptionGroup) and left > 0:
        for number, inner in enumerate(error.exceptions[:_CHAIN_MAX], start=1):
            lines.append(f"  --- {number} of {len(error.exceptions)} ---")
            lines += [f"  {line}" for line in _chain(inner, left - 1)]
    return [*before, *lines]


def listing(frames: Iterable[Frame]) -> list[str]:
    """*frames* as the lines of a traceback; those of a recursion are counted."""
    lines: list[str] = []
    before: Frame | None = None
    same = 0
    for frame in [*frames, None]:
        if frame is not None and frame == before:
            same += 1
            if same >= 3:
                continue
        else:
            if same >= 3:
                lines.append(f"  [the same {same - 2} times more]")
            before, same = frame, 0
        if frame is not None:
            lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.name}')
            source = frame.source
            if source:
                lines.append(f"    {source}")
    return lines


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = "\n[…]\n"
    head = (limit - len(mark)) // 3
    return text[:head] + mark + text[-(limit - len(mark) - head) :]


def stack_text(frames: Sequence[Frame]) -> str:
    """What a stack is doing: the user's frame first, then the way there without our frames."""
    frame = user_frame(frames)
    lines: list[str] = []
    if frame is not None:
        lines = [frame.place, *([f"    {frame.source}"] if frame.source else [])]
    rest = without_ours(frames)
    if rest != [frame]:
        lines += ["Stack (most recent call last):", *listing(rest)]
    return _cut("\n".join(lines), TRACE_MAX)


def of_thread(ident: int) -> list[Frame]:
    """What the thread *ident* of this process is doing now, outermost first."""
    return of_stack(sys._current_frames().get(ident))


__all__ = [
    "TRACE_MAX",
    "Frame",
    "listing",
    "of_fault",
    "of_stack",
    "of_thread",
    "of_traceback",
    "stack_text",
    "summary",
    "trace",
    "trimmed",
    "user_frame",
    "where",
    "without_ours",
]
