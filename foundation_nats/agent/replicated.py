"""`ctx.consensus`: replicated domains in handlers; and the domains that a node follows whether anybody asks or not.

A worker process has one replica per domain, which all its agents share: the first one
that names a domain opens it, and it is followed from then on.

A proposal of a handler is an effect outside the agent's record (P8): it stands even if
the handler raises after it. Its id derives from the signal in hand, so that a handler
that is tried again proposes the same thing again, and it takes effect once.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from foundation_nats.base.logs import Logger
from foundation_nats.consensus.domain import Domain, Proposal
from foundation_nats.consensus.replica import Replica
from foundation_nats.consensus.replicas import Replicas
from foundation_nats.errors import BusError, ConfigError, DomainError

if TYPE_CHECKING:
    from foundation_nats.agent.context import Context

S = TypeVar("S", bound=BaseModel)
O = TypeVar("O")  # noqa: E741  state and operation, see consensus/domain.py

_AGAIN_S = 0.5


class AgentConsensus:
    """Replicated domains, as a handler sees them.

    Example:
        >>> found = await self.ctx.consensus.propose(Seats, Book(seat="12A", by=self.id))
        >>> if found.accepted: ...
    """

    __slots__ = ("_ctx", "_replicas")

    def __init__(self, ctx: Context, replicas: Replicas) -> None:
        self._ctx = ctx
        self._replicas = replicas

    async def open(
        self, domain: Domain[S, O] | type[Domain[S, O]], *, timeout: float = 10.0
    ) -> Replica[S, O]:
        """This worker's replica of *domain*; see `Replicas.open`."""
        return await self._replicas.open(domain, timeout=timeout)

    async def propose(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        operation: Any,
        *,
        id: str | None = None,
        timeout: float = 5.0,
    ) -> Proposal:
        """Have *operation* accepted by the domain, or refused by its validator; see `Replicas.propose`.

        Args:
            id: None: derived from the signal in hand and how many proposals and
                idempotency keys its handler has asked for before.
        """
        if id is None:
            key = self._ctx.idempotency_key
            id = blake2b(f"proposal {key}".encode(), digest_size=16).hexdigest()
        return await self._replicas.propose(domain, operation, id=id, timeout=timeout)

    async def status(
        self, id: str, domain: Domain[S, O] | type[Domain[S, O]], *, timeout: float = 5.0
    ) -> Proposal:
        """What became of a proposal; see `Replicas.status`."""
        return await self._replicas.status(id, domain, timeout=timeout)

    async def read(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        *,
        timeout: float = 5.0,
        barrier: bool = False,
    ) -> S:
        """The state, with everything accepted before this call; see `Replica.read`."""
        return await self._replicas.read(domain, timeout=timeout, barrier=barrier)

    async def view(self, domain: Domain[S, O] | type[Domain[S, O]]) -> S:
        """The state as this worker knows it: at least with the accepted proposals of its agents."""
        return await self._replicas.view(domain)


def load_domain(name: str) -> type[Domain[Any, Any]]:
    """The domain that ``module:Class`` names.

    Raises:
        ConfigError: it can't be imported, or is no `Domain`.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon or not module_name or not class_name:
        raise ConfigError(f"{name!r} is not of the form 'module:Class'.")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(f"The domain {name} can't be imported: {error}.") from error
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Domain)):
        raise ConfigError(f"{name} is not a subclass of foundation_nats.Domain.")
    return found


async def follow(replicas: Replicas, names: Sequence[str], log: Logger) -> None:
    """Open a replica of each domain, as soon as that can be; they are followed until *replicas* closes.

    One whose log this code can't follow is left out, and said: agents go on.

    Raises:
        ConfigError: one is none.
    """
    for domain in [load_domain(name) for name in names]:
        while True:
            try:
                replica = await replicas.open(domain)
            except DomainError as error:
                log.error("domain not followed", domain=domain.name, error=str(error))
            except BusError as error:
                log.info("domain not readable yet", domain=domain.name, error=str(error))
                await asyncio.sleep(_AGAIN_S)
                continue
            else:
                log.info("domain followed", domain=domain.name, revision=replica.revision)
            break
