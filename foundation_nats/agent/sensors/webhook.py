"""`Webhook`: an HTTP endpoint whose requests become durable signals.

202 means that the signal is stored: it takes effect once, or is found among the dead letters. 503 means that
it could not be stored now, or that this is not known: to send it again is right, and harmless if the sender
marks its requests (`id_header`). `door.py` has the servers.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

from foundation_nats.agent.sensors.door import (
    BYTES_MAX,
    TIMEOUT_MAX_S,
    Answer,
    Endpoint,
    Request,
    serving,
    unavailable,
)
from foundation_nats.agent.sensors.http import read_body
from foundation_nats.agent.sensors.sensor import Emit, Event, Sensor, needs
from foundation_nats.errors import ConfigError, FoundationError, PayloadTooLargeError, SensorError

_ID_MAX = 200


class Webhook(Sensor):
    """``Webhook("/orders", port=8080, emit="order.placed")``: the data is the body: JSON, or text.

    Answers: 202 ``{"id": …}`` once the signal is stored; 400 a body that is not what it says; 401 a wrong
    signature; 404, 405; 413 too large; 503 try again. Agents share a port by their paths; every node that
    runs one of them listens, and passes on what is for the others. A port that another program has is
    a failure, tried again with pauses. Needs the extra ``web``.

    Args:
        path: ``{agent}`` in it is the agent's name.
        port: to listen on; None: ``port`` of the agent's config.
        host: to listen at; all addresses: ``0.0.0.0``.
        secret: of an HMAC-SHA256 over the body, in hex, which the request must carry;
            ``env:NAME`` reads it from the worker's environment, ``config:NAME`` from the agent's config.
        signature_header: where it is; a prefix such as ``sha256=`` may be before it.
        id_header: which header tells requests apart; a repeat takes no effect
            (within `mailbox.duplicate_window_s`), and is answered 202.
        whole: the data is ``{"method", "path", "query", "headers", "body"}``.
        bytes_max: a longer body is refused by 413; at most 256 KiB.
        timeout: seconds after which the answer is 503.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        path: str,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        methods: tuple[str, ...] = ("POST",),
        secret: str | None = None,
        signature_header: str = "X-Hub-Signature-256",
        id_header: str = "Idempotency-Key",
        whole: bool = False,
        bytes_max: int = 64 * 1024,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not path.startswith("/"):
            raise ConfigError(f"Webhook {self.name}: the path {path!r} must begin with /")
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"Webhook {self.name}: {port} is no port")
        if secret is not None and not secret:
            raise ConfigError(f"Webhook {self.name}: the secret is empty")
        if not 1 <= bytes_max <= BYTES_MAX or not 0 < timeout <= TIMEOUT_MAX_S:
            raise ConfigError(
                f"Webhook {self.name}: bytes_max must be within 1 and {BYTES_MAX:,}, and timeout "
                f"above 0 and at most {TIMEOUT_MAX_S:g} s"
            )
        self.path = path
        self.port = port
        self.host = host
        self.methods = frozenset(method.upper() for method in methods)
        self.secret = secret
        self.signature_header = signature_header.lower()
        self.id_header = id_header.lower()
        self.whole = whole
        self.bytes_max = bytes_max
        self.timeout = timeout

    def check(self) -> None:
        try:
            import uvicorn  # noqa: F401
        except ImportError:
            raise needs("uvicorn", "web", "Webhook") from None

    async def run(self, emit: Emit) -> None:
        port = self.port if self.port is not None else self.here.config.get("port")
        if not isinstance(port, int):
            raise ConfigError(f"Webhook {self.name}: give a port, or the agent a config.port")
        path = self.path.replace("{agent}", self.here.id)
        secret = self._secret()

        async def handle(request: Request) -> Answer:
            return await self._handle(emit, secret, request)

        endpoint = Endpoint(self.here.id, path, self.methods, self.bytes_max, handle)
        async with serving(self.here, self.host, port, endpoint) as door:
            await door.broken()

    def _secret(self) -> bytes | None:
        if self.secret is None:
            return None
        kind, _, name = self.secret.partition(":")
        found: Any = self.secret
        if kind == "env":
            found = os.environ.get(name)
        elif kind == "config":
            found = self.here.config.get(name)
        if not found:
            raise ConfigError(f"Webhook {self.name}: its secret {self.secret} is not set")
        return str(found).encode()

    async def _handle(self, emit: Emit, secret: bytes | None, request: Request) -> Answer:
        if secret is not None and not self._is_signed(secret, request):
            return Answer(401, {"error": f"the signature in {self.signature_header} is not right"})
        try:
            data = read_body(request.body, request.headers.get("content-type", ""))
        except SensorError as error:
            return Answer(400, {"error": str(error)})
        if self.whole:
            data = {
                "method": request.method,
                "path": request.path,
                "query": dict(parse_qsl(request.query, keep_blank_values=True)),
                "headers": request.headers,
                "body": data,
            }
        given = request.headers.get(self.id_header)
        if given is not None and len(given) > _ID_MAX:
            return Answer(400, {"error": f"{self.id_header} is longer than {_ID_MAX}"})
        if emit.is_full or not self.here.is_valid:
            return unavailable("nothing can be stored now")
        traceparent = request.headers.get("traceparent")
        try:
            async with asyncio.timeout(self.timeout):
                stored = await emit.soon(Event(data, id=given, traceparent=traceparent))
                return Answer(202, {"id": await stored})
        except TimeoutError:
            return unavailable("not known to be stored in time")
        except PayloadTooLargeError as error:
            return Answer(413, {"error": str(error)})
        except FoundationError as error:
            return unavailable(str(error))

    def _is_signed(self, secret: bytes, request: Request) -> bool:
        given = request.headers.get(self.signature_header, "").rpartition("=")[2].strip()
        wanted = hmac.new(secret, request.body, sha256).hexdigest()
        return hmac.compare_digest(given.lower().encode(), wanted.encode())


__all__ = ["Webhook"]
