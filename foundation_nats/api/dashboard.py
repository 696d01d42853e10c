"""`Dashboard`: a cluster in a browser: one page, read-only, from this process alone.

An ASGI application without a framework, as there is little to route: the page, what it asks for as JSON,
and a live tap as server-sent events. The page needs nothing of any network but this; a policy in its headers
keeps the browser from asking others. Nothing here can change a cluster: only GET is answered.

It has no log-in. So it is bound to this machine unless one says otherwise, and on it answers only those
who ask for it by a name of this machine, lest a page of somebody else's has the browser do it (DNS rebinding).
What several browsers look at is asked of the cluster once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.resources import files
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from foundation_nats.api.history import LAST_DEFAULT
from foundation_nats.api.pulse import Pulse, Pulses
from foundation_nats.api.refs import AgentInfo
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import BusError, ConfigError, FoundationError, NotFoundError

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

Parts = dict[str, Any]
Receive = Callable[[], Awaitable[Parts]]
Send = Callable[[Parts], Awaitable[None]]
Query = Mapping[str, str]

PORT_DEFAULT = 8322
LISTED_MAX = 500
"""Agents in one answer."""
VIEWERS_MAX = 32
"""Live streams at a time."""
_PULSE_S = 1.0
_TAP_PER_S = 50
_TAP_EVERY_S = 0.2
_HIDDEN = "(hidden)"


class _RefusedError(Exception):
    """An answer that is no page."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Dashboard:
    """The pages of one cluster."""

    def __init__(
        self, cluster: Cluster, *, host: str = "127.0.0.1", hide_data: bool = False
    ) -> None:
        """
        Args:
            host: where it listens; on a loopback address only names of this machine are answered.
            hide_data: leave out states and payloads.
        """
        self._cluster = cluster
        self._local = is_loopback(host)
        self._hide = hide_data
        self._pulses = Pulses(cluster)
        self._pulse: Pulse | None = None
        self._pulse_at = 0.0
        self._looking = asyncio.Lock()
        self._viewers = 0
        self._ends = asyncio.Event()
        self._log = get_logger("dashboard")

    def end(self) -> None:
        """End the live streams, so that the server can."""
        self._ends.set()

    # ---- ASGI -----------------------------------------------------------------------

    async def __call__(self, scope: Parts, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        try:
            self._check(scope)
            query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
            if scope["path"] == "/":
                await self._page(send)
            elif scope["path"] == "/api/live":
                await self._stream(query, receive, send)
            else:
                await _json(send, 200, await self._answer(scope["path"], query))
        except _RefusedError as error:
            await _json(send, error.status, {"error": {"message": str(error)}})
        except FoundationError as error:
            status = 404 if isinstance(error, NotFoundError) else 503
            status = 400 if isinstance(error, ConfigError) else status
            await _json(send, status, {"error": {"code": error.code, "message": str(error)}})

    def _check(self, scope: Parts) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise _RefusedError(405, "This page only looks on.")
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self._local and not is_loopback(_without_port(asked)):
            raise _RefusedError(421, "Ask for it as 127.0.0.1 or localhost.")

    async def _page(self, send: Send) -> None:
        nonce = token_urlsafe(16)
        page = files("foundation_nats.api").joinpath("dashboard.html").read_text("utf-8")
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        body = page.replace("@NONCE@", nonce).encode()
        await _send(send, 200, b"text/html; charset=utf-8", body, policy)

    # ---- answers --------------------------------------------------------------------

    async def _answer(self, path: str, query: Query) -> Any:
        match path:
            case "/api/pulse":
                return await self._look()
            case "/api/agents":
                return await self._agents(query)
            case "/api/agent":
                return await self._agent(_given(query, "id"))
            case "/api/why":
                return asdict(await self._cluster.why(_given(query, "name")))
            case "/api/topology":
                return asdict(await self._cluster.topology())
        raise _RefusedError(404, "There is no such page.")

    async def _look(self) -> Pulse:
        """A look that is at most a second old."""
        async with self._looking:
            if self._pulse is None or monotonic() - self._pulse_at >= _PULSE_S:
                self._pulse = await self._pulses.next()
                self._pulse_at = monotonic()
            return self._pulse

    async def _agents(self, query: Query) -> dict[str, Any]:
        """Those whose id, deployment or node holds the text, up to a number."""
        registry = await self._cluster._open_registry()
        text, status = query.get("text", "").lower(), query.get("status", "")
        found = []
        for id, held in sorted(registry.all().items()):
            info = AgentInfo.of(held.record)
            where = f"{id} {info.deployment or ''} {info.node or ''}".lower()
            if text in where and status in ("", str(info.status)):
                found.append(info)
        return {"total": len(found), "agents": found[:LISTED_MAX]}

    async def _agent(self, id: str) -> dict[str, Any]:
        agents = self._cluster.agents
        info, stored, history = await asyncio.gather(
            agents.get(id), agents.state(id), agents.history(id, last=LAST_DEFAULT)
        )
        past = history.model_dump(mode="json")
        known = None
        if stored is not None:
            known = {key: stored.get(key) for key in ("epoch", "commit", "cursor", "state")}
        if self._hide:
            for signal in past["signals"]:
                signal["data"] = _HIDDEN
            if known is not None:
                known["state"] = _HIDDEN
        return {"info": info, "stored": known, "history": past}

    # ---- live -----------------------------------------------------------------------

    async def _stream(self, query: Query, receive: Receive, send: Send) -> None:
        if self._viewers >= VIEWERS_MAX:
            raise _RefusedError(503, "Too many look on already.")
        tap = self._cluster.taps.open(
            query.get("pattern") or None,
            agent=query.get("agent") or None,
            where=query.get("where") or None,
        )
        self._viewers += 1
        gone = asyncio.ensure_future(_until_gone(receive))
        ends = asyncio.ensure_future(self._ends.wait())
        try:
            headers = [*_HEADERS, (b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with tap:
                items = aiter(tap)
                waiting: asyncio.Future[Any] | None = None
                try:
                    await _event(send, "ready", {})
                    while not (gone.done() or ends.done()):
                        batch: list[dict[str, Any]] = []
                        missed = tap.dropped
                        until = monotonic() + _TAP_EVERY_S
                        while (left := until - monotonic()) > 0:
                            waiting = waiting or asyncio.ensure_future(anext(items))
                            await asyncio.wait({waiting, gone, ends}, timeout=left)
                            if not waiting.done():
                                break
                            item, waiting = waiting.result(), None
                            if len(batch) < _TAP_PER_S * _TAP_EVERY_S:
                                batch.append(self._shown(item))
                            else:
                                missed += 1
                        if gone.done() or ends.done():
                            break
                        if batch or missed:
                            await _event(send, "items", {"items": batch, "missed": missed})
                            tap.dropped = 0
                        elif not self._cluster.bus.is_connected:
                            await _event(send, "trouble", {"message": "no connection to NATS"})
                finally:
                    if waiting is not None:
                        waiting.cancel()
                        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                            await waiting
            with contextlib.suppress(OSError):
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._viewers -= 1
            for task in (gone, ends):
                task.cancel()

    def _shown(self, item: Any) -> dict[str, Any]:
        body = item.body
        signal = (body.get("signal") or {}) if item.kind == "dead" else body
        if item.kind == "event":
            text: Any = body.get("message")
        else:
            text = _HIDDEN if self._hide else signal.get("data")
        return {
            "at": item.at,
            "kind": item.kind,
            "type": item.type,
            "agent": item.agent or signal.get("subject") or item.subject,
            "source": signal.get("source"),
            "data": text,
            "reason": body.get("reason") if item.kind == "dead" else None,
        }


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _event(send: Send, name: str, value: Any) -> None:
    body = b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(value))
    await send({"type": "http.response.body", "body": body, "more_body": True})


_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


async def _json(send: Send, status: int, value: Any) -> None:
    await _send(send, status, b"application/json", to_json(value))


async def _send(send: Send, status: int, kind: bytes, body: bytes, policy: str = "") -> None:
    headers = [
        *_HEADERS,
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        *([(b"content-security-policy", policy.encode())] if policy else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _given(query: Query, name: str) -> str:
    value = query.get(name, "")
    if not value:
        raise _RefusedError(400, f"?{name}= is missing.")
    return value


def _without_port(asked: str) -> str:
    if asked.startswith("["):
        return asked[1:].partition("]")[0]
    return asked.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether *host* is a name or an address of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.asynccontextmanager
async def serving(
    cluster: Cluster,
    *,
    host: str = "127.0.0.1",
    port: int = PORT_DEFAULT,
    hide_data: bool = False,
) -> AsyncIterator[str]:
    """Serve the dashboard of *cluster*; gives its URL. Port 0: any that is free.

    Raises:
        ConfigError: uvicorn is not installed, or it can't be listened there.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            "The dashboard needs uvicorn.", hint="pip install 'foundation-nats[web]'"
        ) from error

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Signals are the business of whoever called.
            yield

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Can't listen at {host}:{port}: {error.strerror}.", hint="Choose another --port."
        ) from error
    dashboard = Dashboard(cluster, host=host, hide_data=hide_data)
    config = uvicorn.Config(
        dashboard,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    server = Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        if task.done():
            task.result()
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{listener.getsockname()[1]}/"
    finally:
        dashboard.end()
        server.should_exit = True
        with contextlib.suppress(BusError):
            await task
        listener.close()


__all__ = ["PORT_DEFAULT", "Dashboard", "is_loopback", "serving"]
