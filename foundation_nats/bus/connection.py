"""`Bus`: one supervised connection to NATS, its state, and requests that never end in doubt about being in doubt.

It keeps its subscriptions through reconnects and rebuilds a client that
nats-py closed for good (F5). A request that is in flight when the connection
drops fails at once with `BusTimeoutError` (outcome unknown) rather than by its
time-out; nothing is sent later on behalf of a caller that has given up.

Servers that are locators (`foundation_nats.discovery`) are looked up for every new client,
and while the connection is down again and again, beside nats-py's own attempts:
a NATS cluster whose addresses have all changed is found again.

Whoever asks for TLS gets it or no connection: nats-py alone would go on in plain text with a
server that has none.

Handlers run inside the read loop, in the order of arrival. They must not
block, and an error in one is logged, not raised into the connection.

Facts verified on nats-server 2.15.1: a request without listeners is answered
by status 503 in under 1 ms; a denied publish is an asynchronous ``-ERR`` whose
text nats-py lower-cases, so it is matched with the pending requests by subject.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, NamedTuple

from nats import errors as nats_errors

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.login import login_options
from foundation_nats.bus.wire import Handler, Message, Route, WireClient
from foundation_nats.config import BusConfig
from foundation_nats.discovery.contexts import applied
from foundation_nats.discovery.servers import Servers
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    NoRespondersError,
    PayloadTooLargeError,
    PermissionDeniedError,
)

OnReply = Callable[[Message | BusError], None]

_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"', re.I)
_REBUILD_DELAY_MAX_S = 2.0
_EXPIRY_SLACK_S = 0.1
"""How late a request may be said to be unanswered."""
_LOOK_UP_SHARE = 0.5
"""Of the time a connection may take: the look-up of its servers."""
_LOOK_AGAIN_S = 0.25
_LOOK_AGAIN_MAX_S = 5.0
_LOOK_FIRST_S = 0.3
"""How long the first attempt after a drop waits for the first look-up: the old address may be
one that swallows packets, which would cost a whole time-out."""
_WATCH_EVERY_S = 2.0


class _Pending(NamedTuple):
    subject: str
    on_reply: OnReply
    deadline: float
    many: bool


@dataclass(frozen=True, slots=True)
class BusStatistics:
    """Numbers for debugging."""

    connected: bool
    reconnects: int
    rebuilds: int
    pending_requests: int
    routes: int
    unsent_bytes: int


class Bus:
    """One connection; `connect` makes it, `close` ends it."""

    def __init__(self, config: BusConfig, name: str) -> None:
        self._config = config
        self._name = name
        self._servers = Servers(config.servers)
        self._log = get_logger("bus").bind(connection=name)
        self._client: WireClient = WireClient()
        self._routes: set[Route] = set()
        self._inbox = f"{applied(config).inbox_prefix}.{token_hex(11)}"
        self._inbox_length = len(self._inbox) + 1
        self._pending: dict[str, _Pending] = {}
        self._token = 0
        self._closing = False
        self._refusals = 0
        self._refused = asyncio.Event()
        """Every server has refused the login."""
        self._rebuilds = 0
        self._rebuild_task: asyncio.Task[None] | None = None
        self._expiry_at = math.inf
        """When `_expire` looks at the deadlines of what is pending."""
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._servers_task: asyncio.Task[None] | None = None
        self._look_up_now = asyncio.Event()
        self._looked_up = asyncio.Event()
        self._connected = asyncio.Event()
        self._on_disconnect: list[Callable[[], None]] = []
        self._on_reconnect: list[Callable[[], None]] = []
        self._window: deque[asyncio.Future[None]] = deque()
        self.disturbed_at: float | None = None
        """When the connection last dropped or came back, on `monotonic`; None: never."""

    # ---- life -------------------------------------------------------------------

    @classmethod
    async def connect(cls, config: BusConfig, name: str) -> Bus:
        """Connect, within `connect_timeout_s`; sooner it fails once every server has refused the login.

        Raises:
            BusUnavailableError: no server was found, or none answered; names the servers
                and the reason.
            PermissionDeniedError: the credentials were refused.
            ConfigError: a server locator is wrong or needs something that is not installed;
                a file that the settings name is not what it should be.
        """
        bus = cls(config, name)
        try:
            await asyncio.wait_for(bus._open_unless_refused(), config.connect_timeout_s)
        except BaseException as error:
            bus._closing = True
            with contextlib.suppress(Exception):
                await bus._client.close()
            if isinstance(error, (OSError, asyncio.TimeoutError, nats_errors.Error)):
                raise bus._connect_error(error) from error
            raise
        bus._attach_inbox()
        bus._connected.set()
        if not bus._servers.is_fixed:
            bus._servers_task = asyncio.get_running_loop().create_task(bus._follow_servers())
        return bus

    def _connect_error(self, error: BaseException) -> BusError:
        servers = self._servers.shown
        last = self._client.last_error or error
        text = str(last) or type(last).__name__
        if _is_refusal(last) or _is_refusal(error):
            return PermissionDeniedError(
                f"NATS at {servers} refused the credentials.",
                hint="Give --creds FILE, or a user and password in the URL.",
            )
        if isinstance(last, ssl.SSLError):
            return BusUnavailableError(
                f"No connection to NATS at {servers}: TLS failed ({text}).",
                hint="The settings bus.ca, bus.cert and bus.key say whom to trust and who we are; "
                "the name in the URL must be one of the server's certificate.",
            )
        if isinstance(error, TimeoutError) and not self._client.last_error:
            text = f"no answer within {self._config.connect_timeout_s:g} s"
        return BusUnavailableError(
            f"No NATS server answers at {servers} ({text}).",
            hint="Start one with `foundation up`, or name it with --server or FOUNDATION_SERVER.",
        )

    async def _open_unless_refused(self) -> None:
        # nats-py would go on trying, and hide the reason behind that of a later attempt.
        opening = asyncio.ensure_future(self._open(self._client))
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            await asyncio.wait((opening, refused), return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise nats_errors.AuthorizationError
            opening.result()
        finally:
            opening.cancel()
            refused.cancel()
            await asyncio.gather(opening, refused, return_exceptions=True)

    async def _open(self, client: WireClient) -> None:
        config = applied(self._config)
        options = login_options(config)
        # In the order of the look-up, which may be one of priorities; plain URLs in any.
        options["dont_randomize"] = not self._servers.is_fixed
        servers = await self._servers.resolve(config.connect_timeout_s * _LOOK_UP_SHARE)
        client.needs_tls = "tls" in options or config.tls_first or _says_tls(servers)
        await client.connect(
            servers=servers,
            name=self._name,
            connect_timeout=max(1, int(config.connect_timeout_s)),
            max_reconnect_attempts=-1,
            reconnect_to_server_handler=_next_server,
            ping_interval=config.ping_interval_s,  # type: ignore[arg-type]
            max_outstanding_pings=2,
            pending_size=0,
            allow_reconnect=True,
            error_cb=self._error_cb,
            disconnected_cb=self._disconnected_cb,
            reconnected_cb=self._reconnected_cb,
            closed_cb=self._closed_cb,
            **options,
        )

    def _attach_inbox(self) -> None:
        self._client.add_route(Route(f"{self._inbox}.*", self._on_inbox))
        for route in self._routes:
            self._client.add_route(route)

    async def close(self) -> None:
        """Send what is queued, end the connection, fail what is pending. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        for task in (self._servers_task, self._rebuild_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, BusError):
                    await task
        if self._client.is_connected:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._client.flush(), 1.0)
        # nats-py raises odd things when it closes while disconnected.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.close(), 2.0)
        self._fail_pending("the connection was closed")

    # ---- state ------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether a publish would reach a server now."""
        return self._client.is_connected

    @property
    def name(self) -> str:
        """The name of this connection, as the server shows it."""
        return self._name

    @property
    def inbox(self) -> str:
        """The prefix of this connection's reply subjects."""
        return self._inbox

    @property
    def url(self) -> str:
        """The server this connection uses now, without credentials."""
        url = self._client.connected_url
        return f"nats://{url.hostname}:{url.port}" if url is not None else ""

    @property
    def server_facts(self) -> dict[str, Any]:
        """The connected server's INFO."""
        return self._client.server_facts

    @property
    def max_payload(self) -> int:
        """Headers and payload together may not exceed this many bytes."""
        return self._client.max_payload

    async def wait_connected(self, timeout: float) -> None:
        """Wait until a server is connected.

        Raises:
            BusUnavailableError: not within *timeout* seconds.
        """
        try:
            await asyncio.wait_for(self._connected.wait(), timeout)
        except TimeoutError:
            raise BusUnavailableError(
                f"No connection to NATS for {timeout:g} s.", hint="Is the server running?"
            ) from None

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call *callback* whenever the connection drops."""
        self._on_disconnect.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call *callback* whenever the connection is back and all subscriptions are replayed."""
        self._on_reconnect.append(callback)

    def statistics(self) -> BusStatistics:
        """Numbers for debugging."""
        return BusStatistics(
            connected=self.is_connected,
            reconnects=self._client.stats.get("reconnects", 0),
            rebuilds=self._rebuilds,
            pending_requests=len(self._pending),
            routes=len(self._routes),
            unsent_bytes=self._client.unsent_bytes,
        )

    # ---- subscribe and publish ----------------------------------------------------

    def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Route:
        """Call *handler* with each message on *subject*, until `unsubscribe`.

        The interest is known to the server once a later `flush` has returned.
        """
        route = Route(subject, handler, queue)
        self._routes.add(route)
        self._client.add_route(route)
        return route

    def unsubscribe(self, route: Route) -> None:
        """End a subscription. Idempotent."""
        self._routes.discard(route)
        self._client.remove_route(route)

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send without waiting: at most once, and only while connected.

        Raises:
            BusUnavailableError: there is no connection; nothing was sent.
            PayloadTooLargeError: headers and payload exceed the server's limit.
        """
        if not self._client.is_connected:
            raise BusUnavailableError(
                "Not connected to NATS.", hint="The connection is being restored."
            )
        if headers:
            lines = "".join([f"{key}: {value}\r\n" for key, value in headers.items()])
            head = f"NATS/1.0\r\n{lines}\r\n".encode()
            total = len(head) + len(payload)
            if total > self._client.max_payload:
                raise self._too_large(subject, total)
            self._client.write(
                b"HPUB %b %b %d %d\r\n%b%b\r\n"
                % (subject.encode(), reply.encode(), len(head), total, head, payload)
            )
        else:
            if len(payload) > self._client.max_payload:
                raise self._too_large(subject, len(payload))
            self._client.write(
                b"PUB %b %b %d\r\n%b\r\n"
                % (subject.encode(), reply.encode(), len(payload), payload)
            )

    def _too_large(self, subject: str, total: int) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"A message of {total:,} bytes for {subject} exceeds the server's limit of "
            f"{self._client.max_payload:,} bytes.",
            hint="Send a reference to the data instead, or raise max_payload on the server.",
            size=total,
            limit=self._client.max_payload,
        )

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until the server has seen everything sent so far.

        Raises:
            BusTimeoutError: no answer in time.
        """
        try:
            await asyncio.wait_for(self._client.flush(), timeout or self._config.request_timeout_s)
        except (TimeoutError, nats_errors.Error) as error:
            raise BusTimeoutError("NATS did not answer a flush in time.") from error

    # ---- request ------------------------------------------------------------------

    def request_nowait(
        self,
        subject: str,
        payload: bytes,
        on_reply: OnReply,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        many: bool = False,
    ) -> str:
        """Send a request; *on_reply* is called exactly once, with the reply or with an error.

        With *many* it is called for each reply until `forget(token)`. The call
        itself raises only what `publish` raises; then *on_reply* is not called.

        Returns:
            The token for `forget`.
        """
        self._token += 1
        token = format(self._token, "x")
        self.publish(subject, payload, reply=f"{self._inbox}.{token}", headers=headers)
        limit = self._config.request_timeout_s if timeout is None else timeout
        deadline = monotonic() + limit
        self._pending[token] = _Pending(subject, on_reply, deadline, many)
        if deadline + _EXPIRY_SLACK_S < self._expiry_at:
            self._expire_at(deadline)
        return token

    def forget(self, token: str) -> None:
        """Call nothing any more for this request."""
        if self._pending.pop(token, None) is not None and self._window:
            self._open_window()

    async def request(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """Send a request and wait for one reply.

        Cancellation-safe: a late reply is dropped; the peer may have acted.

        Raises:
            NoRespondersError: nobody listens on the subject.
            BusTimeoutError: no reply in time, or the connection dropped: outcome unknown.
            BusUnavailableError: there is no connection; nothing was sent.
            PermissionDeniedError: the credentials don't allow the subject.
            PayloadTooLargeError: headers and payload exceed the server's limit.
        """
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Message | BusError) -> None:
            if future.done():
                return
            if isinstance(reply, BusError):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        token = self.request_nowait(subject, payload, on_reply, headers=headers, timeout=timeout)
        try:
            reply = await future
        finally:
            self.forget(token)
        return reply

    @property
    def has_room(self) -> bool:
        """Whether fewer than `in_flight_max` requests are pending."""
        return len(self._pending) < self._config.in_flight_max

    async def wait_room(self) -> None:
        """Wait until fewer than `in_flight_max` requests are pending: the bound of pipelines."""
        while len(self._pending) >= self._config.in_flight_max:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._window.append(gate)
            try:
                await gate
            finally:
                if gate in self._window:
                    self._window.remove(gate)

    def _open_window(self) -> None:
        room = self._config.in_flight_max - len(self._pending)
        while room > 0 and self._window:
            gate = self._window.popleft()
            if not gate.done():
                gate.set_result(None)
                room -= 1

    def _on_inbox(self, message: Message) -> None:
        token = message.subject[self._inbox_length :]
        pending = self._pending.get(token)
        if pending is None:
            return
        if not pending.many:
            del self._pending[token]
            if self._window:
                self._open_window()
        reply: Message | BusError = message
        if message.raw_headers is not None and message.status == 503 and not message.data:
            self._pending.pop(token, None)
            reply = NoRespondersError(f"Nobody listens on {pending.subject}.")
        try:
            pending.on_reply(reply)
        except Exception:  # see WireClient._process_msg
            self._log.exception("reply handler failed", subject=pending.subject)

    def _expire_at(self, deadline: float) -> None:
        """Look at what is pending at *deadline*, or soon: nobody waits for exact ones."""
        if self._closing:
            return
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self._expiry_at = deadline + _EXPIRY_SLACK_S
        pause = max(_EXPIRY_SLACK_S, self._expiry_at - monotonic())
        self._expiry_timer = asyncio.get_running_loop().call_later(pause, self._expire)

    def _expire(self) -> None:
        self._expiry_timer, self._expiry_at = None, math.inf
        now = monotonic()
        late = [token for token, item in self._pending.items() if item.deadline <= now]
        for token in late:
            item = self._pending.pop(token, None)
            if item is not None:
                self._fail_one(item, f"no reply on {item.subject} in time")
        if late:
            self._open_window()
        # Most are answered long before: one look later than the first deadline is enough.
        first = min((item.deadline for item in self._pending.values()), default=math.inf)
        if first < self._expiry_at:
            self._expire_at(first)

    def _fail_one(self, item: _Pending, reason: str) -> None:
        try:
            item.on_reply(BusTimeoutError(f"NATS request unanswered: {reason}."))
        except Exception:  # see WireClient._process_msg
            self._log.exception("reply handler failed", subject=item.subject)

    def _fail_pending(self, reason: str) -> None:
        pending, self._pending = self._pending, {}
        for item in pending.values():
            self._fail_one(item, reason)
        self._open_window()

    # ---- nats-py's callbacks --------------------------------------------------------

    async def _error_cb(self, error: Exception) -> None:
        match = _DENIED.search(str(error))
        if match is None:
            if _is_refusal(error):
                self._refusals += 1
                if self._refusals >= len(self._client.servers):
                    self._refused.set()
            self._log.debug("nats client error", error=str(error) or type(error).__name__)
            return
        denied = match[2]
        self._log.warning("permission denied", kind=match[1], subject=denied)
        for token, item in list(self._pending.items()):
            if item.subject.lower() == denied.lower():
                self._pending.pop(token, None)
                item.on_reply(
                    PermissionDeniedError(
                        f"These credentials may not publish on {item.subject}.",
                        hint="Use credentials of a role that may.",
                        subject=item.subject,
                    )
                )

    async def _disconnected_cb(self) -> None:
        self._connected.clear()
        self.disturbed_at = monotonic()
        self._client.forget_pending()
        self._fail_pending("the connection dropped")
        if self._closing:
            return
        self._log.warning("disconnected from NATS; reconnecting")
        for callback in list(self._on_disconnect):
            callback()
        if self._servers_task is not None:
            self._looked_up.clear()
            self._look_up_now.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked_up.wait(), _LOOK_FIRST_S)

    async def _reconnected_cb(self) -> None:
        self.disturbed_at = monotonic()
        self._connected.set()
        self._log.info("connected to NATS again", server=self.url)
        for callback in list(self._on_reconnect):
            callback()

    async def _closed_cb(self) -> None:
        if self._closing or (self._rebuild_task is not None and not self._rebuild_task.done()):
            return
        # nats-py gave up for good (F5): only a new client helps.
        self._rebuild_task = asyncio.get_running_loop().create_task(self._rebuild())

    async def _rebuild(self) -> None:
        delay = 0.05
        while not self._closing:
            client = WireClient()
            self._client = client
            try:
                await asyncio.wait_for(self._open(client), self._config.connect_timeout_s)
            except (OSError, TimeoutError, nats_errors.Error, FoundationError) as error:
                self._log.warning("cannot connect to NATS", error=str(error))
                with contextlib.suppress(Exception):
                    await client.close()
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(delay * 2, _REBUILD_DELAY_MAX_S)
                continue
            self._rebuilds += 1
            self._attach_inbox()
            with contextlib.suppress(BusError):
                await self.flush()
            await self._reconnected_cb()
            return

    async def _follow_servers(self) -> None:
        """Look the servers up while there is no connection, and when what is watched changes."""
        delay = _LOOK_AGAIN_S
        while True:
            is_up = self._connected.is_set()
            pause = _WATCH_EVERY_S if is_up else delay * random.uniform(0.75, 1.25)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look_up_now.wait(), pause)
            if self._look_up_now.is_set() or self._connected.is_set():
                delay = _LOOK_AGAIN_S
                if not self._look_up_now.is_set() and not self._servers.has_changed():
                    continue
            else:
                delay = min(delay * 2, _LOOK_AGAIN_MAX_S)
            self._look_up_now.clear()
            try:
                urls = await self._servers.resolve(self._config.connect_timeout_s * _LOOK_UP_SHARE)
                self._client.offer_servers(urls)
            except (FoundationError, nats_errors.Error) as error:
                self._log.warning("servers not looked up; trying those known", error=str(error))
            self._looked_up.set()


def _says_tls(urls: Sequence[str]) -> bool:
    return any(url.partition("://")[0].lower() == "tls" for url in urls)


def _is_refusal(error: BaseException) -> bool:
    return (
        isinstance(error, nats_errors.AuthorizationError) or "authorization" in str(error).lower()
    )


def _next_server(servers: list[Any], _info: Mapping[str, Any]) -> tuple[Any, float]:
    """Round-robin by attempts, with a jittered pause that grows to a second."""
    chosen = min(servers, key=lambda server: server.reconnects)
    pause = min(1.0, 0.03 * 2 ** min(chosen.reconnects, 5))
    return chosen, random.uniform(0.5, 1.0) * pause


__all__ = ["Bus", "BusStatistics", "Message", "Route"]
