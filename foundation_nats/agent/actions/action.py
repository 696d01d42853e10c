"""`Action`: something an agent can do, with a name, typed params and a typed result; a class or a function.

Pure: what an action is. How one is run is in `running.py`, several of them in `plan.py`.

What goes in and what comes out is validated. An action knows no signal and keeps no state of its own, so
that it is used in handlers, in plans, by other agents, by people and by models alike. It may be tried
again, by its own `retries` and by the handler that it runs in: what it does outside belongs into
``ctx.once``.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from foundation_nats.agent.steps import Doubt
from foundation_nats.errors import ActionInvalidError, ConfigError

if TYPE_CHECKING:
    from foundation_nats.agent.actions.running import ActionContext

Undo = Callable[[Any, Any, Any], Awaitable[None]]
OnError = Callable[[Any, Exception, Any], Awaitable[None]]
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONTEXT = "ctx"
_NOTHING = BeforeValidator(lambda given: {} if given is None else given)
"""Who gives no params gives an empty object."""


class Action:
    """Subclass it and write `run`; the types of `run` are those of params and result.

    Raises:
        ConfigError: name, types or numbers are wrong.

    Example:
        >>> class Refund(Action):
        ...     '''Give money back.'''
        ...
        ...     retries = 2
        ...     timeout = 10.0
        ...
        ...     async def run(self, params: Order, ctx: ActionContext) -> Receipt:
        ...         return await ctx.once("pay", pay_back, params.payment)
        ...
        ...     async def undo(self, params: Order, result: Receipt, ctx: ActionContext) -> None:
        ...         await ctx.once("charge", charge, result.number)
    """

    name: str = ""
    """What it is called by; unless said, the class's name in words: ``give_back``."""
    description: str = ""
    """What it does, for people and models; unless said, the docstring."""
    retries: int = 0
    """How often it is tried again when it raises."""
    retry_first_s: float = 0.2
    """The first pause before that; it doubles, with jitter."""
    retry_most_s: float = 10.0
    retry_on: tuple[type[Exception], ...] = (Exception,)
    """What is worth trying again."""
    timeout: float | None = None
    """Seconds for one try."""
    on_doubt: str = Doubt.RERUN
    """What a plan does when it can't tell whether this was done: ``rerun`` or ``fail``."""

    params_type: Any = None
    """What its params are validated against; None: an object, as it comes."""
    result_type: Any = None
    """What its result is validated against; None: as it comes."""

    _types: ClassVar[tuple[Any, Any]] = (None, None)

    def __init__(self) -> None:
        kind = type(self)
        if kind.run is Action.run:
            raise ConfigError(f"{kind.__qualname__} has no `run`")
        self.name = self.name or _words(kind.__name__)
        self.description = self.description or inspect.cleandoc(kind.__doc__ or "")
        if self.params_type is None and self.result_type is None:
            self.params_type, self.result_type = _types_of(kind)
        check(self)

    async def run(self, params: Any, ctx: ActionContext) -> Any:
        """Do it, and return the result."""
        raise NotImplementedError

    async def undo(self, params: Any, result: Any, ctx: ActionContext) -> None:
        """Take back what `run` has done, because a later step of the plan has failed."""

    async def on_error(self, params: Any, error: Exception, ctx: ActionContext) -> None:
        """Tidy up: it was tried for the last time, and has raised *error*, which is raised after this."""

    @property
    def can_undo(self) -> bool:
        """Whether it has an `undo` of its own."""
        return type(self).undo is not Action.undo

    # ---- validation -------------------------------------------------------------------

    @property
    def params_adapter(self) -> TypeAdapter[Any] | None:
        """Validates params."""
        return self._adapters()[0]

    @property
    def result_adapter(self) -> TypeAdapter[Any] | None:
        """Validates results."""
        return self._adapters()[1]

    def _adapters(self) -> tuple[TypeAdapter[Any] | None, TypeAdapter[Any] | None]:
        found: tuple[Any, Any] | None = self.__dict__.get("_made")
        if found is None:
            try:
                found = (
                    None
                    if self.params_type is None
                    else TypeAdapter(cast(Any, Annotated[self.params_type, _NOTHING])),
                    None if self.result_type is None else TypeAdapter(self.result_type),
                )
            except PydanticUserError as error:
                raise ConfigError(
                    f"action {self.name}: its types can't be validated: {error}"
                ) from error
            self.__dict__["_made"] = found
        return found

    def read_params(self, params: Any) -> Any:
        """The params, as `run` takes them.

        Raises:
            ActionInvalidError: they don't fit; says where.
        """
        plain = {} if params is None else params
        adapter = self.params_adapter
        if adapter is None:
            if not isinstance(plain, Mapping | BaseModel):
                raise ActionInvalidError(
                    f"The params of action {self.name} must be an object, "
                    f"not {type(plain).__name__}.",
                    action=self.name,
                )
            return plain
        return _fitting(adapter, plain, f"The params of action {self.name} are not valid", self)

    def read_result(self, result: Any) -> Any:
        """The result, as who ran it gets it.

        Raises:
            ActionInvalidError: it does not fit; says where.
        """
        adapter = self.result_adapter
        if adapter is None:
            return result
        return _fitting(adapter, result, f"What action {self.name} returned is not valid", self)

    def __repr__(self) -> str:
        return f"<action {self.name}>"


class FunctionAction(Action):
    """An action that is a function; made by `action`. Called, it is that function."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        undo: Undo | None,
        on_error: OnError | None,
        options: Mapping[str, Any],
    ) -> None:
        self.function = function
        self._undo = undo
        self._on_error = on_error
        for key, value in options.items():
            setattr(self, key, value)
        self.name = self.name or function.__name__
        self.description = self.description or inspect.cleandoc(function.__doc__ or "")
        _check_name(self.name)
        self._is_async = inspect.iscoroutinefunction(function)
        self._names, self._takes_ctx, self.params_type, self.result_type = _signature(
            function, self.name
        )
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        check(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def run(self, params: Any, ctx: ActionContext) -> Any:
        """Call the function; a plain one in a thread, so that it may block."""
        values: dict[str, Any] = {
            name: getattr(params, field) for name, field in self._names.items()
        }
        if self._takes_ctx:
            values[_CONTEXT] = ctx
        if self._is_async:
            return await self.function(**values)
        return await ctx.run_blocking(self.function, **values)

    async def undo(self, params: Any, result: Any, ctx: ActionContext) -> None:
        if self._undo is not None:
            await self._undo(params, result, ctx)

    async def on_error(self, params: Any, error: Exception, ctx: ActionContext) -> None:
        if self._on_error is not None:
            await self._on_error(params, error, ctx)

    @property
    def can_undo(self) -> bool:
        return self._undo is not None


@overload
def action(function: Callable[..., Any], /) -> FunctionAction: ...


@overload
def action(
    *,
    name: str = "",
    description: str = "",
    retries: int = 0,
    retry_first_s: float = 0.2,
    retry_most_s: float = 10.0,
    retry_on: tuple[type[Exception], ...] = (Exception,),
    timeout: float | None = None,
    on_doubt: str = Doubt.RERUN,
    undo: Undo | None = None,
    on_error: OnError | None = None,
) -> Callable[[Callable[..., Any]], FunctionAction]: ...


def action(
    function: Callable[..., Any] | None = None,
    /,
    *,
    undo: Undo | None = None,
    on_error: OnError | None = None,
    **options: Any,
) -> Any:
    """Make a function an `Action`: its arguments are the params, its docstring the description.

    An argument called ``ctx`` is the `ActionContext`. A plain function runs in a thread: it may block,
    and a time-out ends the waiting only. With the fields of `Action` as options, and
    ``undo(params, result, ctx)`` and ``on_error(params, error, ctx)``.

    Raises:
        ConfigError: the function can't be one; says why.

    Example:
        >>> @action(retries=2)
        ... async def refund(payment: str, amount: int, ctx: ActionContext) -> int:
        ...     '''Give money back.'''
        ...     return await ctx.once("pay", pay_back, payment, amount)
    """

    def make(found: Callable[..., Any]) -> FunctionAction:
        return FunctionAction(found, undo=undo, on_error=on_error, options=options)

    return make if function is None else make(function)


def as_action(what: Any) -> Action:
    """An action, from one or its class.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(what, Action):
        return what
    if isinstance(what, type) and issubclass(what, Action):
        known: Action | None = what.__dict__.get("_single")
        if known is None:
            try:
                known = what()
            except TypeError as error:
                raise ConfigError(f"{what.__qualname__} needs arguments: {error}") from error
            what._single = known  # type: ignore[attr-defined]
        return known
    made = getattr(what, "as_action", None)
    if made is not None and not isinstance(what, type):
        found = made()
        assert isinstance(found, Action)
        return found
    raise ConfigError(
        f"{what!r} is no action: subclass `Action`, or mark a function with `@action`"
    )


def check(found: Action) -> None:
    """Whether its name and its numbers are usable.

    Raises:
        ConfigError: one is not; says which.
    """
    _check_name(found.name)
    if found.retries < 0 or found.retry_first_s <= 0 or found.retry_most_s <= 0:
        raise ConfigError(f"action {found.name}: retries and their pauses can't be negative")
    if found.timeout is not None and found.timeout <= 0:
        raise ConfigError(f"action {found.name}: a timeout of {found.timeout:g} s leaves no time")
    if found.on_doubt not in (Doubt.RERUN, Doubt.FAIL):
        raise ConfigError(f"action {found.name}: on_doubt={found.on_doubt!r}: use rerun or fail")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't be an action's name: use 1 to 64 letters, digits, '-' or '_'"
        )


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _types_of(kind: type[Action]) -> tuple[Any, Any]:
    """The types of params and result, by the annotations of `run`."""
    where = f"{kind.__module__}.{kind.__qualname__}.run"
    run = kind.run
    parameters = list(inspect.signature(run).parameters)
    if len(parameters) != 3:
        raise ConfigError(f"{where} must take two arguments besides self: params and ctx")
    scope: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        scope.update(vars(base))
    hints = _hints(run, where, (parameters[1], "return"), scope)
    found = hints.get(parameters[1]), hints.get("return")
    return tuple(None if item in (Any, type(None)) else item for item in found)  # type: ignore[return-value]


def _hints(
    function: Callable[..., Any], where: str, wanted: tuple[str, ...], scope: Mapping[str, Any]
) -> dict[str, Any]:
    """Annotations as types; only those *wanted*: others may be imported for type checkers alone."""
    stated = {key: value for key, value in function.__annotations__.items() if key in wanted}
    only = types.SimpleNamespace(__annotations__=stated)
    try:
        return typing.get_type_hints(
            only, globalns=function.__globals__, localns=dict(scope), include_extras=True
        )
    except NameError as error:
        raise ConfigError(
            f"{where}: a type can't be resolved ({error}); define it at the top of its module"
        ) from error


def _signature(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, str], bool, type[BaseModel], Any]:
    """Argument names with their fields, whether it takes `ctx`, the model of params, the result's type."""
    where = f"{function.__module__}.{function.__qualname__}"
    found = inspect.signature(function).parameters
    taken = [item for item in found.values() if item.name != _CONTEXT]
    hints = _hints(function, where, (*(item.name for item in taken), "return"), {})
    names: dict[str, str] = {}
    fields: dict[str, Any] = {}
    for item in taken:
        if item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL, item.POSITIONAL_ONLY):
            raise ConfigError(f"{where}: an action's arguments have names, unlike {str(item)!r}")
        # A field may not be called as what every model has.
        hidden = item.name.startswith("_") or hasattr(BaseModel, item.name)
        field = f"p_{item.name.strip('_')}" if hidden else item.name
        default: Any = ... if item.default is item.empty else item.default
        if hidden:
            default = Field(default, alias=item.name)
        elif not isinstance(default, FieldInfo):
            default = Field(default)
        names[item.name] = field
        fields[field] = (hints.get(item.name, Any), default)
    try:
        model = create_model(
            f"{name}_params",
            __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False),
            __module__=function.__module__,
            **fields,
        )
    except (PydanticUserError, NameError) as error:
        raise ConfigError(f"{where}: its arguments can't be validated: {error}") from error
    result = hints.get("return")
    return names, _CONTEXT in found, model, None if result in (Any, type(None)) else result


def _fitting(adapter: TypeAdapter[Any], value: Any, what: str, of: Action) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ActionInvalidError(
            f"{what}: {where + ': ' if where else ''}{first['msg']}.",
            action=of.name,
            errors=[
                {"loc": list(item["loc"]), "msg": item["msg"], "type": item["type"]}
                for item in error.errors(include_url=False, include_input=False)
            ][:20],
        ) from error


__all__ = ["Action", "FunctionAction", "action", "as_action"]
