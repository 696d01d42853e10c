"""The state of an agent: migrations, private fields, constraints, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, PrivateAttr

from foundation_nats import Agent, Signal, State, migrates, on
from foundation_nats.agent.state import dump_state, load_state
from foundation_nats.errors import ConfigError, HandlerError, StateInvalidError
from foundation_nats.testing import AgentHarness


class Third(State):
    """The third version of a purse."""

    version = 3
    cents: int = 0
    currency: str = "EUR"

    @migrates(from_=1)
    def _to_cents(old: dict[str, Any]) -> dict[str, Any]:  # type: ignore[misc]
        return {"cents": round(old.get("euros", 0) * 100)}

    @staticmethod
    @migrates(from_=2)
    def _with_currency(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "currency": "EUR"}


class Bounded(State):
    """With a rule that serialising does not check."""

    level: int = Field(default=0, ge=0, le=10)
    names: list[str] = Field(default_factory=list)
    _seen: int = PrivateAttr(default=0)


class Tank(Agent):
    """Keeps its level within bounds."""

    State = Bounded

    @on("set")
    def set(self, signal: Signal[int]) -> int:
        """Take the level as it comes."""
        self.state._seen += 1
        self.state.level = signal.data
        return self.state._seen


def test_a_stored_state_is_migrated_version_by_version() -> None:
    """Each function makes the next version of what it is given."""
    state = load_state(Third, {"euros": 1.5}, version=1)
    assert state == Third(cents=150, currency="EUR")
    assert load_state(Third, {"cents": 5}, version=2) == Third(cents=5)


@pytest.mark.parametrize(
    ("kind", "stored", "version", "match"),
    [
        (Third, {"cents": 1}, 4, "is version 4, and Third is version 3"),
        (Bounded, {"level": 99}, 1, "level"),
        (Bounded, {"depth": 1}, 1, "depth"),
        (Third, {"euros": "many"}, 1, "raised TypeError"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    kind: type[State], stored: dict[str, Any], version: int, match: str
) -> None:
    """A newer version, a broken rule, an unknown field, a migration that fails."""
    with pytest.raises(StateInvalidError, match=match):
        load_state(kind, stored, version=version)


def test_a_version_without_its_migration_is_refused() -> None:
    """Nothing is guessed."""

    class Jumped(State):
        version = 2

    with pytest.raises(StateInvalidError, match="migrates\\(from_=1\\)"):
        load_state(Jumped, {}, version=1)


def test_a_migration_to_no_version_is_a_mistake() -> None:
    """The version must be raised with it."""
    with pytest.raises(ConfigError, match="set `version = 2`"):

        class Forgot(State):
            @migrates(from_=1)
            def _up(old: dict[str, Any]) -> dict[str, Any]:  # type: ignore[misc]
                return old


async def test_rules_are_checked_at_every_commit_and_private_fields_are_kept() -> None:
    """A handler that breaks a rule leaves no trace but in what is not stored."""
    async with AgentHarness(Tank) as tank:
        assert await tank.ask("set", 3) == 1
        with pytest.raises((StateInvalidError, HandlerError), match="level"):
            await tank.ask("set", 11)
        assert tank.state.level == 3
        assert await tank.ask("set", 4) == 3
        await tank.crash()
        assert await tank.ask("set", 5) == 1


def test_plain_states_are_not_validated_twice() -> None:
    """Only rules cost."""
    assert Bounded._is_strict
    assert not Third._is_strict
    assert dump_state(Third()) == b'{"cents":0,"currency":"EUR"}'
