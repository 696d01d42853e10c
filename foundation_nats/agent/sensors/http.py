"""`HttpPoll`: a signal when what a URL answers has changed, by the `httpx` library."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import orjson

from foundation_nats.agent.sensors.sensor import Emit, Event, Sensor, needs
from foundation_nats.errors import ConfigError, SensorError

if TYPE_CHECKING:
    import httpx


class HttpPoll(Sensor):
    """``HttpPoll("https://…/prices.json", every=60, emit="prices")``: the data is the body: JSON, or text.

    ``ETag`` and ``Last-Modified`` are sent back, and what is equal to the last time is no change, also
    after the agent has moved. A status of 400 or more is a failure: tried again with growing pauses.
    Needs the extra ``http``.

    Args:
        url: ``{agent}`` in it is the agent's name.
        every: seconds between requests, a tenth more or less by chance.
        headers: of the request; ``{"Authorization": …}``.
        whole: the data is ``{"url", "status", "headers", "body"}``.
        timeout: seconds for one request.
        bytes_max: a longer body is a failure.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        every: float = 60.0,
        headers: Mapping[str, str] | None = None,
        whole: bool = False,
        timeout: float = 10.0,
        bytes_max: int = 64 * 1024,
        **options: Any,
    ) -> None:
        options.setdefault("retry_first_s", min(max(every, 0.1), 60.0))
        options.setdefault("retry_most_s", max(600.0, every))
        super().__init__(**options)
        if every <= 0 or timeout <= 0 or bytes_max < 1:
            raise ConfigError(
                f"HttpPoll {self.name}: every, timeout and bytes_max must be positive"
            )
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"HttpPoll {self.name}: {url!r} is no http or https URL")
        self.url = url
        self.every = every
        self.headers = dict(headers or {})
        self.whole = whole
        self.timeout = timeout
        self.bytes_max = bytes_max

    def check(self) -> None:
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise needs("httpx", "http", "HttpPoll") from None

    async def run(self, emit: Emit) -> None:
        import httpx

        position: dict[str, str] = dict(self.here.position or {})
        async with httpx.AsyncClient(timeout=self.timeout, follow_redirects=True) as client:
            while True:
                try:
                    event = await self._poll(client, position)
                except httpx.HTTPError as error:
                    raise SensorError(
                        f"{self._url} does not answer: {str(error) or type(error).__name__}."
                    ) from error
                if event is not None:
                    await emit(event.data, id=event.id, position=event.position)
                    position = event.position
                await self.here.sleep(self.every * (0.9 + 0.2 * self.here.random()))

    @property
    def _url(self) -> str:
        return self.url.replace("{agent}", self.here.id)

    async def _poll(self, client: httpx.AsyncClient, position: Mapping[str, str]) -> Event | None:
        """What has changed since *position*.

        Raises:
            SensorError: the answer is none that can be used.
        """
        headers = dict(self.headers)
        if "etag" in position:
            headers["If-None-Match"] = position["etag"]
        if "modified" in position:
            headers["If-Modified-Since"] = position["modified"]
        async with client.stream("GET", self._url, headers=headers) as response:
            if response.status_code == 304:
                return None
            if response.status_code >= 400:
                raise SensorError(f"{self._url} answers {response.status_code}.")
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > self.bytes_max:
                    raise SensorError(f"{self._url} answers more than {self.bytes_max:,} bytes.")
        digest = blake2b(body, digest_size=16).hexdigest()
        if position.get("digest") == digest:
            return None
        now = {"digest": digest}
        if etag := response.headers.get("etag"):
            now["etag"] = etag
        if modified := response.headers.get("last-modified"):
            now["modified"] = modified
        data: Any = read_body(body, response.headers.get("content-type", ""))
        if self.whole:
            data = {
                "url": str(response.url),
                "status": response.status_code,
                "headers": dict(response.headers),
                "body": data,
            }
        return Event(data, position=now)


def read_body(body: bytes, content_type: str) -> Any:
    """JSON where it says so and is, else text.

    Raises:
        SensorError: it is neither.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        try:
            return orjson.loads(body) if body else None
        except orjson.JSONDecodeError as error:
            raise SensorError(f"The body is said to be JSON, but is not: {error}.") from error
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise SensorError("The body is neither JSON nor text in UTF-8.") from error


__all__ = ["HttpPoll", "read_body"]
