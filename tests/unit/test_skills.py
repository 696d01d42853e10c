"""Skills, middleware and directives: parts of an agent that can be reused, and effects as data."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import Field

from foundation_nats import Agent, Signal, State, on
from foundation_nats.agent.agent import provided, subscribed
from foundation_nats.agent.context import Emission
from foundation_nats.agent.directives import (
    Cancel,
    Cron,
    Custom,
    Directive,
    Emit,
    Error,
    Reply,
    Schedule,
    SetState,
    Stop,
    executes,
)
from foundation_nats.agent.handling import handlings
from foundation_nats.agent.middleware import Middleware
from foundation_nats.agent.skills import Skill, SkillConfig
from foundation_nats.errors import ConfigError, HandlerError, StateInvalidError
from foundation_nats.testing import AgentHarness


class Trail(Middleware):
    """Notes who passes, refuses what is forbidden, stamps what leaves."""

    seen: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    async def handle(self, agent: Any, signal: Signal[Any], proceed: Any) -> Any:
        self.seen.append(f"{self.name} {signal.type}")
        if signal.type == "forbidden":
            return "refused"
        return await proceed(signal)

    def emit(self, agent: Any, emission: Emission) -> Emission | None:
        if emission.type == "secret":
            return None
        return emission.with_data({**emission.value, "by": agent.id})


class Tally(Skill):
    """Counts."""

    name = "tally"
    capabilities = ("counting",)
    subscriptions = ("counts.*",)

    class State(State):
        """Its slice."""

        total: int = 0

    class Config(SkillConfig):
        """How much one is."""

        step: int = 1

    async def on_start(self, recovered_from: Any) -> None:
        self.emit("began", {"skill": self.mount}, to="agent:log")

    @on("add")
    def add(self, signal: Signal[int]) -> int:
        """Add so many."""
        self.state.total += signal.data * self.config.step
        return int(self.state.total)


class Worker(Agent):
    """Two tallies, with a trail around."""

    skills = (Tally(), Tally("double", step=2))
    middleware = (Trail("outer"), Trail("inner"))

    class State(State):
        """Its own."""

        name: str = ""
        notes: dict[str, Any] = Field(default_factory=dict)

    @on("forbidden")
    async def forbidden(self, signal: Signal[Any]) -> str:
        """Never reached."""
        raise AssertionError

    @on("tell")
    def tell(self, signal: Signal[str]) -> None:
        """Emit two."""
        self.emit("secret", {"x": 1}, to="agent:log")
        self.emit("public", {"x": 2}, to="agent:log")


async def test_a_skill_is_mounted_twice_with_a_state_of_its_own() -> None:
    """Types, config and state are within its name; capabilities and topics are the agent's."""
    async with AgentHarness(Worker, config={"double": {"step": 3}}) as worker:
        assert [item.data["skill"] for item in worker.take("began")] == ["tally", "double"]
        assert await worker.ask("tally.add", 2) == 2
        assert await worker.ask("double.add", 2) == 6
        await worker.crash()
        assert worker.state.model_dump() == {
            "name": "",
            "notes": {},
            "tally": {"total": 2},
            "double": {"total": 6},
        }
    assert provided(Worker) == ["counting"]
    assert [item.topic for item in subscribed(Worker)] == ["counts.*", "counts.*"]
    assert handlings(Worker).types() == ["double.add", "forbidden", "tally.add", "tell"]


async def test_an_agent_goes_before_its_skills() -> None:
    """Its own handler of a skill's type replaces that."""

    class Strict(Worker):
        @on("tally.add")
        def mine(self, signal: Signal[int]) -> str:
            return "mine"

    async with AgentHarness(Strict) as strict:
        assert await strict.ask("tally.add", 1) == "mine"


@pytest.mark.parametrize(
    ("config", "match"),
    [({"double": {"step": "x"}}, "skill double .*step"), ({"double": 3}, "must be an object")],
)
async def test_a_wrong_configuration_of_a_skill_is_named(
    config: dict[str, Any], match: str
) -> None:
    """Before anything is handled."""
    with pytest.raises(ConfigError, match=match):
        await AgentHarness(Worker, config=config).start()


def test_skills_that_do_not_go_together_are_refused() -> None:
    """Equal names, missing ones, names of fields."""

    class Needy(Skill):
        requires = ("tally",)

    with pytest.raises(ConfigError, match="two skills are called 'tally'"):
        type("Twice", (Agent,), {"skills": (Tally(), Tally())})
    with pytest.raises(ConfigError, match="needy requires tally"):
        type("Alone", (Agent,), {"skills": (Needy(),)})
    with pytest.raises(ConfigError, match="share a name"):
        type("Clash", (Worker,), {"skills": (Tally("name"),)})


async def test_middleware_stands_around_handlers_and_before_what_leaves() -> None:
    """The first is outermost, and may answer itself."""
    Trail.seen.clear()
    async with AgentHarness(Worker) as worker:
        worker.take()
        assert await worker.ask("forbidden") == "refused"
        assert Trail.seen == ["outer forbidden"]
        await worker.ask("tell", "x")
        assert Trail.seen[1:] == ["outer tell", "inner tell"]
        assert [(item.type, item.data) for item in worker.take()] == [
            ("public", {"x": 2, "by": "agent"})
        ]


# ---- directives ---------------------------------------------------------------------------


class Page(Custom, name="page"):
    """Call somebody."""

    number: str

    async def execute(self, agent: Any) -> None:
        agent.state.paged = [*agent.state.paged, self.number]


class Print(Custom, name="print"):
    """Carried out by a function."""

    text: str


@executes(Print)
async def _print(item: Print, agent: Any) -> None:
    agent.state.paged = [*agent.state.paged, item.text]


class Planner(Agent):
    """Returns directives."""

    class State(State):
        """What was done."""

        paged: list[str] = Field(default_factory=list)
        nested: dict[str, Any] = Field(default_factory=lambda: {"a": {"b": 1}})
        number: int = 0

    @on("plan")
    def plan(self, signal: Signal[Any]) -> list[Directive]:
        """All kinds at once."""
        return [
            Emit("went", {"n": 1}, to="agent:other"),
            Schedule("again", {"n": 2}, after=60, name="again"),
            Cron("daily", "0 9 * * *", "daily"),
            Cancel("old"),
            Error("something is odd", {"code": 7}),
            SetState({"nested": {"a": {"c": 2}}, "number": 5}),
            Page(number="110"),
            Print(text="hello"),
            Reply("done", type="planned"),
        ]

    @on("bad")
    def bad(self, signal: Signal[Any]) -> Directive:
        """Does not fit the state."""
        self.emit("lost", to="agent:other")
        return SetState({"number": "many"})

    @on("end")
    def end(self, signal: Signal[Any]) -> Directive:
        """Over."""
        return Stop("enough")

    @on("again")
    def again(self, signal: Signal[Any]) -> None:
        """A timer."""
        self.state.number += 1


async def test_directives_are_carried_out_with_the_commit() -> None:
    """Those of the platform at once, one's own by the agent's own signal."""
    async with AgentHarness(Planner) as planner:
        assert await planner.ask("plan", source="agent:boss") == "done"
        sent = {item.type: item for item in planner.take()}
        assert sent["went"].to == "agent:other"
        assert sent["again"].timer == "again"
        assert sent["daily"].timer == "daily"
        assert sent["planned"].to == "agent:boss"
        assert [(event.what, event.data) for event in planner.events] == [("error", {"code": 7})]
        assert planner.state.nested == {"a": {"b": 1, "c": 2}}
        assert planner.state.paged == ["110", "hello"]
        await planner.advance(60)
        assert planner.state.number == 6


async def test_a_directive_that_fails_undoes_all() -> None:
    """As anything else in a handler."""
    async with AgentHarness(Planner) as planner:
        with pytest.raises((StateInvalidError, HandlerError), match="number"):
            await planner.ask("bad")
        assert planner.take() == []


async def test_stop_is_a_directive() -> None:
    """After the signal in hand."""
    async with AgentHarness(Planner) as planner:
        await planner.ask("end")
        assert planner.stopped == "enough"


def test_two_directives_of_one_name_are_refused() -> None:
    """The name is what is stored."""
    with pytest.raises(ConfigError, match="are the directive 'page'"):

        class Other(Custom, name="page"):
            """Another."""
