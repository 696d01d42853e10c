"""Ledgers whose states change with the release: which one a process has says ``FOUNDATION_TEST_RELEASE``."""

from __future__ import annotations

import os

import fleet
from pydantic import Field

from foundation_nats import State, migrates

RELEASE = int(os.environ.get("FOUNDATION_TEST_RELEASE", "1"))

if RELEASE == 1:

    class Ledger(fleet.Ledger):
        """As it was."""

    class Mirror(fleet.Mirror):
        """As it was."""

else:

    class Ledger(fleet.Ledger):  # type: ignore[no-redef]
        """Its starts have another name."""

        class State(State):
            version = 2
            applied: list[str] = Field(default_factory=list)
            activations: int = 0

            @migrates(from_=1)
            @staticmethod
            def renamed(old: dict[str, object]) -> dict[str, object]:
                """What was `starts`."""
                return {"applied": old["applied"], "activations": old["starts"]}

        async def on_start(self, recovered_from: object) -> None:
            self.state.activations += 1

    class Mirror(fleet.Mirror):  # type: ignore[no-redef]
        """As it was."""
