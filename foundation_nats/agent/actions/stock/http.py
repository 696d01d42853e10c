"""`Http`: one HTTP request, bounded in time and size, to hosts that are named. By the `httpx` library, extra ``http``.

A request that changes something is a step: it is sent with ``Idempotency-Key``, and after a crash again
only if nobody knows whether it was. Redirects are not followed unless `redirects` says how many, and only
to hosts that are named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

import orjson
from pydantic import BaseModel, ConfigDict, Field

from foundation_nats.agent.actions.action import Action
from foundation_nats.agent.actions.running import ActionContext
from foundation_nats.errors import ActionError, ConfigError

_SAFE = ("GET", "HEAD")
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpParams(BaseModel):
    """One request."""

    model_config = ConfigDict(extra="forbid")

    url: str
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] = "GET"
    query: dict[str, str] = Field(default_factory=dict)
    body: Any = Field(default=None, description="sent as JSON; text is sent as it is")


class HttpResult(BaseModel):
    """The answer, whatever its status."""

    status: int
    headers: dict[str, str]
    body: Any
    """JSON where it says so and is, else text."""


class Http(Action):
    """Send an HTTP request, and return status, headers and body."""

    def __init__(
        self,
        hosts: Collection[str],
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        bytes_max: int = 64 * 1024,
        redirects: int = 0,
        name: str = "http",
    ) -> None:
        """For these *hosts* (``api.example.org``, or with a port) and no others; ``*``: any.

        Args:
            headers: of every request, such as ``Authorization``; who asks can't see or set them.

        Raises:
            ConfigError: an argument is wrong.
        """
        if isinstance(hosts, str) or not hosts:
            raise ConfigError("Http: name the hosts that may be asked, as in Http(['example.org'])")
        if bytes_max < 1 or redirects < 0:
            raise ConfigError("Http: bytes_max must be positive, redirects not negative")
        self.hosts = frozenset(hosts)
        self.headers = dict(headers or {})
        self.timeout = timeout
        self.bytes_max = bytes_max
        self.redirects = redirects
        self.name = name
        super().__init__()

    async def run(self, params: HttpParams, ctx: ActionContext) -> HttpResult:
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise ConfigError("Http needs httpx: pip install 'foundation-nats[http]'") from None
        self._check(params.url)
        if params.method in _SAFE:
            return await self._send(params, "")

        async def send(idempotency_key: str) -> HttpResult:
            return await self._send(params, idempotency_key)

        found: HttpResult = await ctx.once("send", send, returns=HttpResult)
        return found

    def _check(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ActionError(f"{url!r} is no URL: {error}.") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ActionError(f"{url!r} is no http or https URL.")
        named = host if port is None else f"{host}:{port}"
        if not {"*", host, named} & self.hosts:
            raise ActionError(f"{named} may not be asked.")

    async def _send(self, params: HttpParams, key: str) -> HttpResult:
        import httpx

        headers = {**self.headers, **({"Idempotency-Key": key} if key else {})}
        method, url = params.method, params.url
        content: dict[str, Any] = {}
        if isinstance(params.body, str):
            content = {"content": params.body}
        elif params.body is not None:
            content = {"json": params.body}
        query: dict[str, str] | None = params.query or None
        try:
            async with asyncio.timeout(self.timeout), httpx.AsyncClient(timeout=None) as client:  # noqa: S113
                for _ in range(self.redirects + 1):
                    async with client.stream(
                        method, url, params=query, headers=headers, **content
                    ) as response:
                        further = response.headers.get("location")
                        if response.status_code not in _REDIRECTS or not further:
                            return await self._read(response)
                    if method not in _SAFE or not self.redirects:
                        return HttpResult(
                            status=response.status_code, headers={"location": further}, body=None
                        )
                    before, url, query = url, urljoin(url, further), None
                    self._check(url)
                    if urlsplit(before).netloc != urlsplit(url).netloc:
                        headers = {}  # What proves who asks is for the host that was asked.
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise ActionError(f"{params.url} does not answer: {what}.") from error
        raise ActionError(f"{params.url} redirects more than {self.redirects} times.")

    async def _read(self, response: Any) -> HttpResult:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > self.bytes_max:
                raise ActionError(f"The answer is longer than {self.bytes_max:,} bytes.")
        return HttpResult(
            status=response.status_code,
            headers=dict(response.headers),
            body=_decoded(bytes(body), response.headers.get("content-type", "")),
        )


def _decoded(body: bytes, content_type: str) -> Any:
    kind = content_type.partition(";")[0].strip().lower()
    if body and (kind == "application/json" or kind.endswith("+json")):
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            pass
    return body.decode("utf-8", "replace")


__all__ = ["Http", "HttpParams", "HttpResult"]
