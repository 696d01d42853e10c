"""Servers from a file: a URL a line, or a list in JSON or YAML.

IO. The file is looked at every two seconds. Whoever writes it should write a new file and
rename it over the old one: a file that is read while it is being written may
be taken for a shorter list. Mounted ConfigMaps do that by themselves.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from foundation_nats.discovery.locator import Found, Locator, is_locator, shown
from foundation_nats.errors import BusUnavailableError, ConfigError

_BYTES_MAX = 1024 * 1024
_HOST = re.compile(r"[\w.:%-]+")


class ByFile:
    """``file:///PATH``: the servers the file lists, in its order."""

    async def __call__(self, locator: Locator, timeout_s: float) -> list[Found]:
        """Read the file.

        Raises:
            ConfigError: the locator or what stands in the file is wrong.
            BusUnavailableError: the file is missing, can't be read, or names no server.
        """
        path = _path(locator)
        try:
            with path.open("rb") as file:
                content = file.read(_BYTES_MAX + 1)
        except OSError as error:
            raise BusUnavailableError(
                f"The server list {path} can't be read: {error.strerror or error}.",
                hint="Write one NATS URL a line into it.",
            ) from error
        if len(content) > _BYTES_MAX:
            raise ConfigError(f"The server list {path} is larger than 1 MiB.")
        try:
            urls = read(content.decode())
        except ValueError as error:
            raise ConfigError(
                f"The server list {path} is wrong: {error}.", hint="Write one NATS URL a line."
            ) from error
        if not urls:
            raise BusUnavailableError(
                f"The server list {path} names no server.", hint="Write one NATS URL a line."
            )
        return [Found(url, note=str(path)) for url in urls]

    def stamp(self, locator: Locator) -> object:
        """What changes with the file."""
        try:
            found = os.stat(_path(locator))
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _path(locator: Locator) -> Path:
    locator.accept(path=True)
    if locator.host not in ("", "localhost") or locator.path in ("", "/"):
        raise locator.wrong("write file:///absolute/path, with three slashes")
    return Path(locator.path)


def read(text: str) -> list[str]:
    """The URLs in *text*, in their order.

    Raises:
        ValueError: it is no list of NATS URLs; says what is wrong.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        return []
    if lines[0].startswith("["):
        items = _list(text)
    elif lines[0] == "---" or lines[0].startswith("- "):
        items = _yaml(text)
    else:
        items = list(lines)
    return [_url(item) for item in items]


def _list(text: str) -> list[object]:
    try:
        return list(json.loads(text))
    except ValueError:
        return _yaml(text)


def _yaml(text: str) -> list[object]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(found, list):
        raise ValueError("it is no list")
    return found


def _url(item: object) -> str:
    if not isinstance(item, str) or not item or any(c.isspace() for c in item):
        raise ValueError(f"{item!r} is no NATS URL")
    if is_locator(item):
        raise ValueError(f"{shown(item)!r} is no NATS URL; locators can't stand in a file")
    url = item if "://" in item else f"nats://{item}"
    parts = urlsplit(url)
    if _HOST.fullmatch(parts.hostname or "") is None or parts.port == 0:
        raise ValueError(f"{shown(item)!r} is no NATS URL")
    return url


by_file = ByFile()
