"""`AnyAgent`: an agent as its parts see it, so that they need not know the class that knows them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, Protocol

from foundation_nats.agent.context import Context
from foundation_nats.agent.signal import Payload
from foundation_schemas import Target


class AnyAgent(Protocol):
    """What skills, middleware, directives and strategies use of `Agent`."""

    state: Any
    ctx: Context

    @property
    def id(self) -> str:
        """The agent's name."""

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration."""

    @property
    def skill(self) -> dict[str, Any]:
        """Its skills by name."""

    @property
    def skills(self) -> Collection[Any]:
        """What is mounted on its class."""

    def emit(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        to: str | Target,
        ttl: float | None = None,
        deadline: datetime | None = None,
        attempts: int | None = None,
        on_error: str = "",
        inherit_deadline: bool | None = None,
        urgent: bool = False,
    ) -> None:
        """See `Agent.emit`."""
