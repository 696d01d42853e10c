"""Children of an agent under test: what it wished for is written down, and the test plays the children.

No IO.
"""

from __future__ import annotations

from typing import Any

from foundation_nats.agent.family import find
from foundation_nats.agent.kin import EXITED, STARTED
from foundation_schemas import Deployment, FamilyRecord, ParentLink


class Playground:
    """Carries out orders about children by remembering them; see `Nursery`."""

    def __init__(self) -> None:
        self.children: dict[str, Deployment] = {}
        """What runs, as far as the test says: id to its wish."""
        self.ending: dict[str, ParentLink] = {}
        """Those that were told to stop and have not said that they did."""
        self.refused: dict[str, str] = {}
        """Ids that can't be had, to the reason; for the test to fill."""

    async def start(self, wish: Deployment) -> str | None:
        if wish.name in self.refused:
            return self.refused[wish.name]
        self.children[wish.name] = wish
        return None

    async def stop(self, parent: str, child: str, order: int, reason: str) -> bool:
        wish = self.children.pop(child, None)
        link = None if wish is None else wish.spec.parent
        if link is None or link.order != order:
            return False
        self.ending[child] = link
        return True

    async def adopt(self, child: str, link: ParentLink) -> str | None:
        if child in self.refused:
            return self.refused[child]
        spec = {"run": "adopted:Agent", "parent": link}
        self.children[child] = Deployment.model_validate({"name": child, "spec": spec})
        return None

    def started(self, family: FamilyRecord, tag: str) -> tuple[str, dict[str, Any]]:
        """The signal that a child runs.

        Raises:
            KeyError: there is no such child.
        """
        found = find(family, tag)
        if found is None:
            raise KeyError(tag)
        return STARTED, {"id": found.id, "tag": tag, "order": found.order, "node": "test"}

    def exited(
        self, family: FamilyRecord, tag: str, status: str, reason: str
    ) -> tuple[str, dict[str, Any]]:
        """The signal that a child has ended.

        Raises:
            KeyError: there is no such child.
        """
        found = find(family, tag)
        if found is None:
            raise KeyError(tag)
        self.children.pop(found.id, None)
        self.ending.pop(found.id, None)
        data = {"id": found.id, "tag": tag, "order": found.order}
        return EXITED, {**data, "status": status, "reason": reason}
