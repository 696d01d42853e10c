"""`Judgement`: what one checker says of one history."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHOWN_MAX = 10


@dataclass(slots=True)
class Judgement:
    """Violations by one checker, and how much it looked at."""

    checker: str
    invariant: int
    """Its number in the list of docs/reliability.md."""
    violations: list[str] = field(default_factory=list)
    violations_count: int = 0
    """All of them; `violations` holds the first few."""
    looked_at: int = 0
    undecided: list[str] = field(default_factory=list)
    """What it could not decide, and why."""

    def violated(self, text: str) -> None:
        """Note one violation."""
        self.violations_count += 1
        if len(self.violations) < _SHOWN_MAX:
            self.violations.append(text)

    @property
    def is_clean(self) -> bool:
        """Nothing violated, and everything decided."""
        return self.violations_count == 0 and not self.undecided
