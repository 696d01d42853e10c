"""`Judgement`: what one checker says of one history."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_SHOWN_MAX = 5
"""Of each sort, so that a hundred lost signals don't hide the one that came twice."""


@dataclass(slots=True)
class Judgement:
    """Violations by one checker, and how much it looked at."""

    checker: str
    invariant: int
    """Its number in the list of docs/reliability.md."""
    violations: list[str] = field(default_factory=list)
    """The first few of each sort."""
    sorts: Counter[str] = field(default_factory=Counter)
    """How many of each sort, which is the text before the colon."""
    looked_at: int = 0
    undecided: list[str] = field(default_factory=list)
    """What it could not decide, and why."""
    may_be_idle: bool = False
    """Whether a sound round may show it nothing; another judge that saw nothing makes its round void."""

    @property
    def violations_count(self) -> int:
        """All of them, shown or not."""
        return self.sorts.total()

    def violated(self, text: str, sort: str = "") -> None:
        """Note one violation of a *sort*, such as ``lost``."""
        self.sorts[sort] += 1
        if self.sorts[sort] <= _SHOWN_MAX:
            self.violations.append(f"{sort}: {text}" if sort else text)

    @property
    def is_clean(self) -> bool:
        """Nothing violated, and everything decided."""
        return self.violations_count == 0 and not self.undecided
