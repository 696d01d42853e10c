"""`quiet_server`: uvicorn inside a process of ours, which has its own signal handlers and its own logs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal


def quiet_server(app: Any, *, lifespan: Literal["on", "off"]) -> Any:
    """A server of the ASGI application *app*, to be served on sockets of the caller's.

    Raises:
        ImportError: uvicorn is not installed; callers say which extra brings it.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan=lifespan,
            ws="none",
            interface="asgi3",
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=512,
        )
    )


__all__ = ["quiet_server"]
