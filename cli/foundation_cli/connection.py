"""The options every command shares, and which server, cluster and credentials they come to.

Order: flag, environment, NATS context, this user's running `foundation up`,
``nats://127.0.0.1:4222``. Options count before and after the command's name;
the one nearer to the end wins. NATS contexts are read, never written; what one
asks for and we cannot do (client certificates, nkeys) is refused, not ignored.

Nothing here imports the library before a command really connects, so that
``--help`` is quick.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from foundation_cli import runtime, values

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.bus.assets import Missing
    from foundation_nats.config import Config

T = TypeVar("T")

DEFAULT_URL = "nats://127.0.0.1:4222"
DEFAULT_CLUSTER = "default"
DEFAULT_TIMEOUT_S = 5.0
CLIENT_NAME = "cli"
"""One source for all commands: an id counts per source, so `send --id` may be repeated."""
_CONNECT_TIMEOUT_MAX_S = 5.0
_REFUSED_PATIENCE_S = 1.0
"""How long a server may refuse connections: about as long as its restart takes."""


class Output(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


@dataclass(frozen=True, slots=True)
class Shared:
    """The shared options as given; None: not given."""

    server: str | None = None
    cluster: str | None = None
    creds: str | None = None
    context: str | None = None
    timeout: float | None = None
    output: Output | None = None

    @property
    def timeout_s(self) -> float:
        """How long one answer may take."""
        return DEFAULT_TIMEOUT_S if self.timeout is None else self.timeout

    @property
    def format(self) -> Output:
        """How to print results."""
        return self.output or Output.TABLE


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect, as whom, to which cluster, and where we know that from."""

    urls: tuple[str, ...]
    cluster: str
    origin: str
    creds: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey: str | None = None
    user_jwt: str | None = field(default=None, repr=False)
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    tls_first: bool | None = None
    inbox_prefix: str | None = None

    @property
    def shown(self) -> str:
        """The servers as people may see them: without credentials."""
        return ", ".join(re.sub(r"//[^/@]*@", "//", url) for url in self.urls)


# ---- options --------------------------------------------------------------------------

_OPTIONS: dict[str, Any] = {
    "server": Annotated[
        str | None,
        typer.Option(
            "--server",
            "-s",
            metavar="URL",
            help="NATS server or its locator, such as dns://NAME [env: FOUNDATION_SERVER].",
        ),
    ],
    "cluster": Annotated[
        str | None,
        typer.Option(
            "--cluster", "-c", metavar="NAME", help="Cluster name [env: FOUNDATION_CLUSTER]."
        ),
    ],
    "creds": Annotated[
        str | None,
        typer.Option("--creds", metavar="FILE", help="Credentials file [env: FOUNDATION_CREDS]."),
    ],
    "context": Annotated[
        str | None,
        typer.Option("--context", metavar="NAME", help="NATS context [env: NATS_CONTEXT]."),
    ],
    "timeout": Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="DURATION",
            parser=values.duration,
            help="How long an answer may take, such as 500ms or 30s (5s unless given).",
        ),
    ],
    "output": Annotated[
        Output | None,
        typer.Option("--output", "-o", metavar="table|json|yaml", help="How to print results."),
    ],
}


def _option_parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]


def with_shared(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared options; it receives them as its first argument, a `Shared`."""
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

    def command(ctx: typer.Context, **arguments: Any) -> None:
        for name in _OPTIONS:
            arguments.pop(name)
        function(collect(ctx), **arguments)

    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, context, *_option_parameters()]
    )
    command.__annotations__ = {}
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    return command


def group_callback(doc: str, extra: Callable[[bool], None] | None = None) -> Callable[..., None]:
    """The callback of a group, so that the shared options count before a command's name too."""

    def callback(**_: Any) -> None: ...

    parameters = _option_parameters()
    if extra is not None:
        option = typer.Option(
            "--version", callback=extra, is_eager=True, help="Show the version and exit."
        )
        parameters.append(
            inspect.Parameter(
                "version",
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, option],
            )
        )
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {}
    callback.__doc__ = doc
    return callback


def collect(ctx: typer.Context) -> Shared:
    """The shared options given anywhere on the command line."""
    chain: list[Mapping[str, Any]] = []
    here: Any = ctx
    while here is not None:
        chain.append(here.params)
        here = here.parent
    found: dict[str, Any] = {}
    for params in reversed(chain):
        for item in fields(Shared):
            if params.get(item.name) is not None:
                found[item.name] = params[item.name]
    return Shared(**found)


# ---- resolution -------------------------------------------------------------------------


def resolve(shared: Shared, environment: Mapping[str, str] | None = None) -> Endpoint:
    """What the options, the environment, the NATS context and the running `up` come to.

    Raises:
        ConfigError: a context is missing, broken or asks for what we can't do;
            or several `up` run and none was named.
    """
    env = os.environ if environment is None else environment
    server_env = env.get("FOUNDATION_SERVER") or env.get("FOUNDATION_BUS__SERVERS")
    creds = shared.creds or env.get("FOUNDATION_CREDS") or env.get("FOUNDATION_BUS__CREDS")
    cluster = shared.cluster or env.get("FOUNDATION_CLUSTER")
    found: Endpoint | None = None
    if shared.context:
        found = _from_context(shared.context, env)
        if shared.server:
            found = replace(found, urls=_urls(shared.server), origin="--server")
    elif shared.server:
        found = Endpoint(_urls(shared.server), DEFAULT_CLUSTER, "--server")
    elif server_env:
        found = Endpoint(_urls(server_env), DEFAULT_CLUSTER, "FOUNDATION_SERVER")
    else:
        from foundation_nats.discovery.contexts import selected

        name = selected(env)
        found = _from_context(name, env) if name else _from_running(cluster)
    if creds:
        nobody = replace(found, user=None, password=None, token=None, nkey=None, user_jwt=None)
        found = replace(nobody, creds=creds)
    found = replace(found, cluster=cluster or found.cluster)
    if found.creds and not Path(found.creds).expanduser().is_file():
        raise _config_error(
            f"The credentials file {found.creds} does not exist.", "Check --creds or the context."
        )
    if found.creds:
        found = replace(found, creds=str(Path(found.creds).expanduser()))
    return found


def _urls(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    return tuple(part if "://" in part else f"nats://{part}" for part in parts if part)


def _config_error(message: str, hint: str) -> Exception:
    from foundation_nats.errors import ConfigError

    return ConfigError(message, hint=hint)


def _from_running(cluster: str | None) -> Endpoint:
    entries = {entry.cluster: entry for entry in runtime.running()}
    if cluster is not None:
        entry = entries.get(cluster)
    else:
        entry = entries.get(DEFAULT_CLUSTER)
        if entry is None and len(entries) > 1:
            names = ", ".join(sorted(entries))
            raise _config_error(
                f"Several clusters run here: {names}.", "Say which one with --cluster NAME."
            )
        if entry is None and entries:
            (entry,) = entries.values()
    if entry is None:
        return Endpoint((DEFAULT_URL,), cluster or DEFAULT_CLUSTER, "default")
    return Endpoint((entry.url,), entry.cluster, "foundation up")


def _from_context(name: str, env: Mapping[str, str]) -> Endpoint:
    from foundation_nats.discovery import contexts

    found = contexts.read(name, env)
    return Endpoint(found.servers, DEFAULT_CLUSTER, f"NATS context {name}", **found.settings)


# ---- connecting ---------------------------------------------------------------------------


def load_config(endpoint: Endpoint, *, connect_timeout_s: float | None = None) -> Config:
    """The library's settings for *endpoint*.

    Raises:
        ConfigError: a setting is wrong.
    """
    from foundation_nats.config import Config

    bus: dict[str, Any] = {
        "servers": endpoint.urls,
        "creds": endpoint.creds,
        "user": endpoint.user,
        "password": endpoint.password,
        "token": endpoint.token,
        "nkey": endpoint.nkey,
        "user_jwt": endpoint.user_jwt,
        "ca": endpoint.ca,
        "cert": endpoint.cert,
        "key": endpoint.key,
        "tls_first": endpoint.tls_first,
        "inbox_prefix": endpoint.inbox_prefix,
        "connect_timeout_s": connect_timeout_s,
    }
    given = {key: value for key, value in bus.items() if value is not None}
    return Config.load(cluster=endpoint.cluster, bus=given)


async def _refused(urls: tuple[str, ...], patience_s: float) -> bool:
    """Whether every server refuses connections, and still does after *patience_s*.

    The library waits its whole time-out for a server that may come back; a
    person who has forgotten to start one should not.
    """
    import asyncio
    from urllib.parse import urlsplit

    from foundation_nats.discovery.locator import is_locator

    if any(is_locator(url) for url in urls):
        return False  # where they are is for the library to find out
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while True:
        for url in urls:
            try:
                parts = urlsplit(url)
                host, port = parts.hostname or "127.0.0.1", parts.port or 4222
                async with asyncio.timeout(patience_s):
                    _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return False
            except ConnectionRefusedError:
                continue
            except (OSError, ValueError):
                return False  # something else is wrong: the library says what
        if loop.time() >= deadline:
            return True
        await asyncio.sleep(0.05)


@asynccontextmanager
async def connected(shared: Shared, *, missing: Missing = "refuse") -> AsyncIterator[Cluster]:
    """The cluster the options name; *missing* as in `Cluster.connect`.

    Raises:
        BusUnavailableError: nobody answers there.
        PermissionDeniedError: the credentials were refused.
        ConfigError: an option, the environment or a context is wrong.
        ServerError: the server can't carry a cluster, or has lost streams of this one.
    """
    from foundation_nats import Cluster
    from foundation_nats.errors import BusTimeoutError, BusUnavailableError

    endpoint = resolve(shared)
    limit = min(shared.timeout_s, _CONNECT_TIMEOUT_MAX_S)
    config = load_config(endpoint, connect_timeout_s=limit)
    if await _refused(endpoint.urls, min(limit, _REFUSED_PATIENCE_S)):
        raise BusUnavailableError(
            f"No NATS server answers at {endpoint.shown} (connection refused).",
            hint="Start one with `foundation up`, or name it with --server or FOUNDATION_SERVER.",
        )
    cluster = Cluster.connect(
        list(endpoint.urls),
        cluster=endpoint.cluster,
        creds=endpoint.creds,
        name=CLIENT_NAME,
        config=config,
        timeout=limit,
        missing=missing,
    )
    try:
        opened = await cluster
    except BusTimeoutError as error:
        raise BusUnavailableError(
            f"The NATS server at {endpoint.shown} does not answer: {error.message}",
            hint="Is JetStream up? `foundation doctor` says more once it answers.",
        ) from error
    try:
        yield opened
    finally:
        await opened.close()


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a command's coroutine to its end; logs go nowhere unless FOUNDATION_LOG_LEVEL asks."""
    from foundation_nats.base import logs, tasks

    logs.configure(level=os.environ.get("FOUNDATION_LOG_LEVEL", "critical"))
    return tasks.run(main)
