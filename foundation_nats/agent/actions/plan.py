"""`Plan`: actions with names, run in the order of what they need, side by side where nothing stands between.

Pure: a plan is data (JSON), written in Python, by a person or by a model; and decisions about what may run
now. `carrying.py` runs it.

A step needs the steps that its params refer to, and those in `after`. The graph has no cycles; that is
checked when the plan is made. A plan names actions: those of the agent that runs it, and those it was
written with. So a plan from elsewhere can do no more than the agent itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from foundation_nats.agent.actions.action import Action, as_action
from foundation_nats.agent.actions.refs import INPUT, as_data, ref, steps_in
from foundation_nats.agent.actions.running import ActionContext, Instruction
from foundation_nats.errors import ConfigError
from foundation_schemas.base import is_name

STEPS_MAX = 300
"""In one plan: each is a step of the agent's ledger, and so is each undoing."""


class PlanStep(BaseModel):
    """One action of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    action: str
    params: dict[str, Any] = Field(default_factory=dict)
    """With references to results of other steps."""
    after: tuple[str, ...] = ()
    """Steps that must have ended before, besides those that are referred to."""
    feed: str | None = None
    """A step (or ``input``) whose result gives the params that are not given; see `chain`."""
    when: Any = True
    """Left out if this is false, null, zero or empty; its result is null then."""
    undo: Instruction | None = None
    """What takes it back if a later step fails, instead of the action's own `undo`."""
    retries: int | None = Field(default=None, ge=0)
    """Instead of the action's own."""
    timeout: float | None = Field(default=None, gt=0)

    @property
    def needs(self) -> set[str]:
        """The steps that must have ended before; ``input`` is none."""
        found = {*self.after, *steps_in(self.params), *steps_in(self.when)}
        if self.feed is not None:
            found.add(self.feed)
        return found - {INPUT}


class Plan(BaseModel):
    """Steps, and what is made of their results.

    Immutable: `step` returns another one.

    Raises:
        ConfigError: two steps share a name, one needs another that is not there, or itself.

    Example:
        >>> book = (
        ...     Plan("book")
        ...     .step("seat", Seat, {"trip": ref("input").trip})
        ...     .step("charge", Charge, {"amount": ref("seat").price})
        ...     .returning({"ticket": ref("charge").number})
        ... )
        >>> await self.ctx.run(book, {"trip": "t-1"})
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "plan"
    description: str = ""
    steps: tuple[PlanStep, ...] = ()
    returns: Any = None
    """What it gives, with references; null: all results, by step."""
    parallel: int = Field(default=8, ge=1)
    """So many steps at once."""
    _known: dict[str, Action] = PrivateAttr(default_factory=dict)
    _takes: Any = PrivateAttr(default=None)

    def __init__(self, name: str | None = None, /, **data: Any) -> None:
        if name is not None:
            data["name"] = name
        super().__init__(**data)
        check_plan(self)

    def __eq__(self, other: object) -> bool:
        """Equal as data."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, data: Any) -> Plan:
        """A plan from JSON, or what it says.

        Raises:
            ConfigError: it is none; says what is wrong.
        """
        try:
            if isinstance(data, str | bytes):
                return cls.model_validate_json(data)
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"This is no plan: {where}: {first['msg']}") from error

    def step(
        self,
        name: str,
        action: Any,
        params: Any = None,
        *,
        after: str | Collection[str] = (),
        feed: str | None = None,
        when: Any = True,
        undo: Any = None,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> Plan:
        """The plan with one more step.

        Args:
            action: an `Action`, a `Plan`, or the name of one of the agent's actions.
            params: an object, with `ref` where a result belongs.
            after: steps that must have ended before; those that are referred to need not be said.
            when: a `ref`: the step is left out if that is false.
            undo: an action, or ``(action, params)``, instead of the action's own `undo`.

        Raises:
            ConfigError: it does not fit.
        """
        known = dict(self._known)
        found = PlanStep(
            name=name,
            action=_named(action, known),
            params=as_data(params) or {},
            after=(after,) if isinstance(after, str) else tuple(after),
            feed=feed,
            when=as_data(when),
            undo=_undo(undo, known),
            retries=retries,
            timeout=timeout,
        )
        return self._with(known, steps=(*self.steps, found))

    def returning(self, value: Any) -> Plan:
        """The plan, giving *value*, which refers to results."""
        return self._with(self._known, returns=as_data(value))

    def taking(self, params: Any) -> Plan:
        """The plan, with the type that its params must have."""
        made = self._with(self._known)
        made._takes = params
        return made

    def _with(self, known: Mapping[str, Action], **changes: Any) -> Plan:
        data = {name: getattr(self, name) for name in type(self).model_fields}
        made = Plan(**{**data, **changes})
        made._known = dict(known)
        made._takes = self._takes
        return made

    def as_action(self) -> Action:
        """The plan as one action, for `Agent.actions` and for other plans."""
        return PlanAction(self)


class PlanAction(Action):
    """A plan that is run as one action."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.name = plan.name
        self.description = plan.description or f"The plan {plan.name}."
        self.params_type = plan._takes
        super().__init__()

    async def run(self, params: Any, ctx: ActionContext) -> Any:
        from foundation_nats.agent.actions.carrying import carry

        return await carry(self.plan, params, ctx)

    async def undo(self, params: Any, result: Any, ctx: ActionContext) -> None:
        from foundation_nats.agent.actions.carrying import take_back

        await take_back(self.plan, params, ctx)


def chain(name: str, *links: Any) -> Plan:
    """A plan in which each action gets the result of the one before.

    The fields of a result that the next action knows are its params; a result that is no object is its
    only param that must be given. What is given here goes before both. It gives the last result.

    Args:
        links: actions, or ``(action, params)``.

    Raises:
        ConfigError: there are none, or one is no action.

    Example:
        >>> await self.ctx.run(chain("brew", Boil, (Pour, {"cups": 2}), Serve), {"litres": 1})
    """
    if not links:
        raise ConfigError(f"chain {name}: has no actions")
    plan, before = Plan(name), INPUT
    for number, link in enumerate(links, start=1):
        action, params = link if isinstance(link, tuple) else (link, None)
        label = f"s{number}"
        plan = plan.step(label, action, params, feed=before)
        before = label
    return plan.returning(ref(before))


def _named(action: Any, known: dict[str, Action]) -> str:
    if isinstance(action, str):
        return action
    found = as_action(action)
    other = known.setdefault(found.name, found)
    if other is not found and not (
        isinstance(other, PlanAction) and isinstance(found, PlanAction) and other.plan == found.plan
    ):
        raise ConfigError(f"two actions of the plan are called {found.name!r}: give one a name")
    return found.name


def _undo(undo: Any, known: dict[str, Action]) -> Instruction | None:
    if undo is None or isinstance(undo, Instruction):
        return undo
    action, params = undo if isinstance(undo, tuple) else (undo, None)
    return Instruction(action=_named(action, known), params=as_data(params) or {})


# ---- decisions ------------------------------------------------------------------------


def check_plan(plan: Plan) -> None:
    """Whether the plan can be run to its end.

    Raises:
        ConfigError: it can't; says why.
    """
    if not is_name(plan.name):
        raise ConfigError(f"{plan.name!r} can't be a plan's name: use letters, digits, '-' and '_'")
    if len(plan.steps) > STEPS_MAX:
        raise ConfigError(f"plan {plan.name} has {len(plan.steps)} steps, at most {STEPS_MAX}")
    names = {INPUT}
    for step in plan.steps:
        if not is_name(step.name) or step.name in names:
            what = "is there twice" if step.name in names else "is no name"
            raise ConfigError(f"plan {plan.name}: step {step.name!r} {what}")
        names.add(step.name)
    for step in plan.steps:
        asked = step.needs | (steps_in(step.undo.params) if step.undo else set())
        _known_all(plan, f"step {step.name}", asked, names)
    _known_all(plan, "what it returns", steps_in(plan.returns), names)
    in_order(plan)


def _known_all(plan: Plan, who: str, asked: Iterable[str], names: Collection[str]) -> None:
    missing = sorted(set(asked) - set(names))
    if missing:
        raise ConfigError(f"plan {plan.name}: {who} needs {', '.join(missing)}, which is no step")


def in_order(plan: Plan) -> list[PlanStep]:
    """The steps so that each comes after those it needs; else as they were written.

    Raises:
        ConfigError: some need each other; names them.
    """
    found: list[PlanStep] = []
    done: set[str] = set()
    left = list(plan.steps)
    while left:
        step = next((item for item in left if item.needs <= done), None)
        if step is None:
            names = ", ".join(item.name for item in left)
            raise ConfigError(f"plan {plan.name}: these steps wait for each other: {names}")
        left.remove(step)
        done.add(step.name)
        found.append(step)
    return found


def ready(plan: Plan, begun: Collection[str], ended: Collection[str]) -> list[PlanStep]:
    """The steps that can begin now."""
    over = set(ended)
    return [step for step in plan.steps if step.name not in begun and step.needs <= over]


def fed(action: Action, given: Mapping[str, Any], fed_by: Any) -> dict[str, Any]:
    """The params of a step that is fed by a result; see `chain`."""
    schema = action.params_adapter.json_schema() if action.params_adapter is not None else {}
    if "$ref" in schema:
        schema = schema["$defs"][str(schema["$ref"]).rpartition("/")[2]]
    properties = schema.get("properties")
    if isinstance(fed_by, Mapping):
        if properties is None or schema.get("additionalProperties") is True:
            return {**fed_by, **given}
        return {**{key: fed_by[key] for key in fed_by if key in properties}, **given}
    open_ = [name for name in schema.get("required", ()) if name not in given]
    if fed_by is None or not open_:
        return dict(given)
    return {open_[0]: fed_by, **given}


__all__ = ["Plan", "PlanStep", "chain", "check_plan", "fed", "in_order", "ready"]
