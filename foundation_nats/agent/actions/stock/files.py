"""Files below one directory: `ReadFile`, `WriteFile`, `ListFiles`; nothing outside it can be named.

Paths are relative to `root`, and looked at after links are followed: ``..``, absolute paths and links that
lead outside are refused. Not guarded: somebody else who changes links at the same moment.
`WriteFile` replaces a file as a whole, so a reader sees the old or the new one, and to write again does no harm.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from secrets import token_hex
from typing import Any

from pydantic import BaseModel, ConfigDict

from foundation_nats.agent.actions.action import Action
from foundation_nats.agent.actions.running import ActionContext
from foundation_nats.errors import ActionError, ConfigError

ENTRIES_MAX = 1_000


class _Files(Action):
    """What is bound to a directory."""

    def __init__(self, root: str | Path, *, bytes_max: int = 256 * 1024) -> None:
        """*bytes_max*: of one file."""
        if bytes_max < 1:
            raise ConfigError(f"{type(self).__qualname__}: bytes_max must be positive")
        self.root = Path(root)
        self.bytes_max = bytes_max
        super().__init__()

    def _inside(self, path: str) -> Path:
        root = self.root.resolve()
        try:
            found = (root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ActionError(f"{path!r} can't be a path: {error}.") from error
        if not found.is_relative_to(root):
            raise ActionError(f"{path!r} is outside of what may be used.")
        return found


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ReadParams(_Params):
    """Of `ReadFile`."""

    path: str


class ReadFile(_Files):
    """Read a text file."""

    async def run(self, params: ReadParams, ctx: ActionContext) -> str:
        found = self._inside(params.path)
        return await asyncio.to_thread(self._read, found, params.path)

    def _read(self, found: Path, path: str) -> str:
        try:
            with found.open("rb") as file:
                data = file.read(self.bytes_max + 1)
            if len(data) > self.bytes_max:
                raise ActionError(f"{path!r} is longer than {self.bytes_max:,} bytes.")
            return data.decode()
        except OSError as error:
            raise ActionError(f"{path!r} can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ActionError(f"{path!r} is no text in UTF-8.") from error


class WriteParams(_Params):
    """Of `WriteFile`."""

    path: str
    text: str


class WriteFile(_Files):
    """Write a text file, in place of what is there; its directory must exist. Returns the bytes written."""

    async def run(self, params: WriteParams, ctx: ActionContext) -> int:
        data = params.text.encode()
        if len(data) > self.bytes_max:
            raise ActionError(f"The text is longer than {self.bytes_max:,} bytes.")
        found = self._inside(params.path)
        await asyncio.to_thread(self._write, found, params.path, data)
        return len(data)

    def _write(self, found: Path, path: str, data: bytes) -> None:
        beside = found.with_name(f".{found.name}.{token_hex(4)}")
        try:
            beside.write_bytes(data)
            os.replace(beside, found)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ActionError(f"{path!r} can't be written: {error.strerror}.") from error


class ListParams(_Params):
    """Of `ListFiles`."""

    path: str = "."


class ListFiles(_Files):
    """List a directory: names, whether each is a directory, and sizes."""

    async def run(self, params: ListParams, ctx: ActionContext) -> list[dict[str, Any]]:
        found = self._inside(params.path)
        return await asyncio.to_thread(self._list, found, params.path)

    def _list(self, found: Path, path: str) -> list[dict[str, Any]]:
        try:
            names = sorted(os.listdir(found))[:ENTRIES_MAX]
        except OSError as error:
            raise ActionError(f"{path!r} can't be listed: {error.strerror}.") from error
        listed = []
        for name in names:
            entry = found / name
            is_directory = entry.is_dir() and not entry.is_symlink()
            size = 0 if is_directory else entry.lstat().st_size
            listed.append({"name": name, "directory": is_directory, "bytes": size})
        return listed


__all__ = ["ListFiles", "ReadFile", "WriteFile"]
