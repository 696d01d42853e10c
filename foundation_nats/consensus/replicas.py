"""`Replicas`: the domains that one process follows: each is opened when it is first used, and shared by all who use it.

IO: one `Replica` per domain. What each call guarantees is `Replica`'s.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.consensus.domain import Domain, Proposal, ProposalStatus, check_id
from foundation_nats.consensus.replica import Replica
from foundation_nats.errors import ConfigError

S = TypeVar("S", bound=BaseModel)
O = TypeVar("O")  # noqa: E741  state and operation, see consensus/domain.py

_IDS_MAX = 1024


class Replicas:
    """The replicated domains of one process."""

    def __init__(self, bus: Bus, subjects: Subjects, copies: int) -> None:
        """
        Args:
            copies: of the stream of a domain that has to be created.
        """
        self._bus = bus
        self._subjects = subjects
        self._copies = copies
        self._replicas: dict[str, tuple[type, Replica[Any, Any]]] = {}
        self._opening = asyncio.Lock()
        self._homes: OrderedDict[str, str] = OrderedDict()
        """In which domain a proposal of ours is, by its id."""

    async def open(
        self, domain: Domain[S, O] | type[Domain[S, O]], *, timeout: float = 10.0
    ) -> Replica[S, O]:
        """This process's replica of *domain*, up to date when this returns.

        Raises:
            ConfigError: the declaration is wrong, or another one has its name.
            DomainError: the log is damaged, or of a newer version than this code.
            BusTimeoutError, BusUnavailableError: not read within *timeout*.
        """
        declared = domain() if isinstance(domain, type) else domain
        async with self._opening:
            found = self._replicas.get(declared.name)
            if found is not None:
                if found[0] is not type(declared):
                    raise ConfigError(
                        f"The domain name {declared.name} is that of {found[0].__qualname__} "
                        f"already, and {type(declared).__qualname__} declares it too."
                    )
                return found[1]
            replica = Replica(self._bus, self._subjects, declared, replicas=self._copies)
            await replica.open(timeout=timeout)
            self._replicas[declared.name] = (type(declared), replica)
            return replica

    async def propose(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        operation: Any,
        *,
        id: str | None = None,
        timeout: float = 5.0,
    ) -> Proposal:
        """Have *operation* accepted by the domain, or refused by its validator.

        *operation* is one of the domain's models, or a dict that fits one. The result
        is accepted with its revision, rejected with the reason, or unknown: ask
        `status` with its id, or propose it again with the same *id*, which takes
        effect once.

        Raises:
            PayloadInvalidError: *operation* fits none of the domain's models.
            BusUnavailableError, DomainBusyError: not accepted within *timeout*, for certain.
            DomainFullError, PayloadTooLargeError, PermissionDeniedError: not accepted.
            ConfigError, DomainError: as in `open`.
        """
        replica = await self.open(domain, timeout=timeout)
        found = await replica.propose(operation, id=id, timeout=timeout)
        self._homes[found.id] = replica.name
        while len(self._homes) > _IDS_MAX:
            self._homes.popitem(last=False)
        return found

    async def status(
        self,
        id: str,
        domain: Domain[S, O] | type[Domain[S, O]] | None = None,
        *,
        timeout: float = 5.0,
    ) -> Proposal:
        """What became of a proposal: accepted, rejected, or not found as of a revision.

        *domain* may be left out for a proposal of this process, and is then looked for
        in the domains that it has open.

        Raises:
            ConfigError: *id* is no id, or no domain is named or open.
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
        """
        check_id(id)
        if domain is not None:
            return await (await self.open(domain)).status(id, timeout=timeout)
        home = self._homes.get(id)
        asked = [replica for name, (_, replica) in self._replicas.items() if home in (None, name)]
        if not asked:
            raise ConfigError(f"Say which domain proposal {id} is of: none is open here.")
        for replica in asked:
            found = await replica.status(id, timeout=timeout)
            if found.status is not ProposalStatus.NOT_FOUND:
                return found
        return found

    async def read(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        *,
        timeout: float = 5.0,
        barrier: bool = False,
    ) -> S:
        """The state, with everything accepted before this call; see `Replica.read`.

        Raises:
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
            ConfigError, DomainError: as in `open`.
        """
        replica = await self.open(domain, timeout=timeout)
        return await replica.read(timeout=timeout, barrier=barrier)

    async def view(self, domain: Domain[S, O] | type[Domain[S, O]]) -> S:
        """The state as this process knows it: at least with its own accepted proposals.

        Raises:
            ConfigError, DomainError: as in `open`.
        """
        return (await self.open(domain)).view

    def revisions(self) -> Mapping[str, int]:
        """Domain to the revision up to which it is applied here."""
        return {name: replica.revision for name, (_, replica) in self._replicas.items()}

    async def close(self) -> None:
        """Follow no domain any more. Idempotent."""
        replicas, self._replicas = self._replicas, {}
        for _, replica in replicas.values():
            await replica.close()

    async def until_closed(self) -> None:
        """Wait to be cancelled, and close."""
        try:
            await asyncio.Event().wait()
        finally:
            await self.close()
