"""A node without agents for tests of the control plane: it says that it runs what it is given.

Everything but the hosting is real: its own connection, membership, registry and
controller. `kill` ends it as SIGKILL would: no good-bye, no lease given back.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Change, Held, Registry
from foundation_nats.config import Config
from foundation_nats.control.controller import Controller
from foundation_nats.errors import FoundationError
from foundation_schemas import AgentStatus, NodeRecord


def config_for(url: str, **sections: Any) -> Config:
    """Settings for a test's cluster."""
    return Config.model_validate({"cluster": "t", "bus": {"servers": [url]}, **sections})


class FakeNode:
    """One member of the control plane."""

    def __init__(self, config: Config, name: str, *, eligible: bool = True, **record: Any) -> None:
        self.config = config
        self.name = name
        self._eligible = eligible
        self._record = NodeRecord(name=name, incarnation=0, **record)
        self.was_replaced = asyncio.Event()
        self._open = False
        self.may_start = True

    async def start(self) -> FakeNode:
        """Join and become a candidate."""
        config = self.config
        self.subjects = Subjects(config.cluster)
        self.bus = await Bus.connect(config.bus, self.name)
        self._open = True
        await assets.ensure(self.bus, config)
        self.scope = TaskScope(self.name)
        self.membership = Membership(
            self.bus,
            self.subjects,
            config.liveness,
            record=self._record,
            on_replaced=self.was_replaced.set,
        )
        try:
            await self.membership.join(self.scope)
        except BaseException:
            await self.kill()
            raise
        self.registry = Registry(self.bus, self.subjects)
        self.registry.subscribe(self._on_record)
        await self.registry.open(self.scope)
        self.controller = Controller(
            self.bus,
            self.subjects,
            config,
            self.membership,
            self.registry,
            eligible=self._eligible,
        )
        await self.controller.open(self.scope)
        return self

    def _on_record(self, agent: str, held: Held | None) -> None:
        if held is None or held.record.node != self.name or not self.may_start:
            return
        record = held.record
        if record.incarnation != self.membership.incarnation:
            return
        if record.desired == "stop":
            if record.status is not AgentStatus.STOPPED:
                self._write(held, status=AgentStatus.STOPPED, node=None)
        elif record.status is AgentStatus.STARTING:
            self._write(held, status=AgentStatus.RUNNING, failures=0, reason=None)

    def _write(self, held: Held, **changes: Any) -> None:
        async def write() -> None:
            change = Change(held.record.id, held.record.model_copy(update=changes), held.revision)
            # Refused: the record has changed, and the change is looked at in its turn.
            with contextlib.suppress(FoundationError):
                await self.registry.write(change)

        self.scope.start(write(), "write")

    def statuses(self) -> dict[str, tuple[str, str | None]]:
        """Agent to (status, node), as this node sees them."""
        return {
            agent: (held.record.status.value, held.record.node)
            for agent, held in self.registry.all().items()
        }

    async def kill(self) -> None:
        """End without a word."""
        if not self._open:
            return
        self._open = False
        self.membership.close()
        await self.scope.close()
        await self.bus.close()

    async def stop(self) -> None:
        """End in good order."""
        if not self._open:
            return
        await self.controller.close()
        await self.membership.leave()
        await self.kill()
