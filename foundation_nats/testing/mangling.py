"""Splits what a NATS server sends into whole messages, and drops, doubles or swaps some of them.

Pure. What may happen to a republished copy between server and client by the
protocol's own promise (at most once, in order) is less; a client that survives
this survives more than it must: double delivery and reordering too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mangling:
    """How often what happens to a message that is chosen."""

    drop: float = 0.0
    double: float = 0.0
    swap: float = 0.0
    """With the chosen message that follows."""


class Splitter:
    """Bytes in, whole protocol frames out, each with its subject (empty: no message)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """The frames that are complete now."""
        buffer = self._buffer
        buffer += data
        frames: list[tuple[str, bytes]] = []
        start = 0
        while True:
            end = buffer.find(b"\r\n", start)
            if end < 0:
                break
            subject, stop = "", end + 2
            if buffer[start : start + 4] == b"MSG " or buffer[start : start + 5] == b"HMSG ":
                words = bytes(buffer[start:end]).split()
                subject = words[1].decode()
                stop = end + 2 + int(words[-1]) + 2
                if len(buffer) < stop:
                    break
            frames.append((subject, bytes(buffer[start:stop])))
            start = stop
        del buffer[:start]
        return frames


class Mangler:
    """One connection's stream of frames, mangled as it is told at the time."""

    def __init__(
        self,
        current: Callable[[], Mangling | None],
        chosen: Callable[[str], bool],
        chance: random.Random,
    ) -> None:
        self._current = current
        self._chosen = chosen
        self._chance = chance
        self._splitter = Splitter()
        self._kept: bytes | None = None
        self.touched = 0
        """Messages dropped, doubled or swapped so far."""

    def feed(self, data: bytes) -> bytes:
        """What goes on to the client."""
        out = bytearray()
        mangling = self._current()
        for subject, frame in self._splitter.feed(data):
            if mangling is None or not subject or not self._chosen(subject):
                out += frame
            else:
                self._mangle(frame, mangling, out)
        if mangling is None and self._kept is not None:
            out += self._kept
            self._kept = None
        return bytes(out)

    def _mangle(self, frame: bytes, mangling: Mangling, out: bytearray) -> None:
        dice = self._chance.random()
        if dice < mangling.drop:
            self.touched += 1
        elif dice < mangling.drop + mangling.double:
            self.touched += 1
            out += frame + frame
        elif dice < mangling.drop + mangling.double + mangling.swap and self._kept is None:
            self.touched += 1
            self._kept = frame
        else:
            out += frame
            if self._kept is not None:
                out += self._kept
                self._kept = None
