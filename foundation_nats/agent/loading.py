"""From ``module:Class`` to the class, with an error that says what is wrong with it.

Imports run the user's code, so this happens in workers only, never in a
manager or in the leader.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from pydantic import ValidationError

from foundation_nats.agent.agent import Agent, provided, subscribed
from foundation_nats.agent.handling import handlings
from foundation_nats.agent.sensors.sensor import check_sensors
from foundation_nats.agent.state import dump_state, first_state
from foundation_nats.base import frames
from foundation_nats.errors import ConfigError, FoundationError
from foundation_schemas import AgentSpec, ClassInfo


def run_name(cls: type[Agent]) -> str:
    """``module:Class`` of a class that a worker can import.

    Raises:
        ConfigError: it was defined in ``__main__`` or inside a function.
    """
    if cls.__module__ == "__main__":
        # `python demo.py` runs as __main__; workers can import it by its file name.
        file = getattr(sys.modules["__main__"], "__file__", None)
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec is not None else Path(file).stem if file else None
        if module is None:
            raise ConfigError(
                f"{cls.__qualname__} is defined in an interactive session, where workers can't "
                "import it: put it into a module"
            )
    else:
        module = cls.__module__
    if "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"{cls.__qualname__} is defined inside a function, where workers can't import it: "
            "move it to the top of its module"
        )
    return f"{module}:{cls.__qualname__}"


def spec_of(run: str, cls: type[Agent]) -> AgentSpec:
    """What the class says of where and how its agents run.

    Raises:
        ConfigError: some of it is wrong; names it.
    """
    said = {
        "resources": dict(cls.resources),
        "placement": cls.placement,
        "restart": cls.restart,
        "restart_limit": cls.restart_limit,
        "rate": cls.rate,
        "on_node_loss": cls.on_node_loss,
    }
    try:
        return AgentSpec.model_validate(
            {"run": run, **{key: value for key, value in said.items() if value is not None}}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{run}: {where}: {first['msg']}") from error


def load_class(run: str) -> type[Agent]:
    """Import the class and check that it can run.

    Raises:
        ConfigError: the module or class is missing, is no Agent, or declares something wrong.
    """
    module_name, _, class_name = run.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise ConfigError(
                f"{run}: module {module_name!r} needs {error.name!r}, which is not installed"
            ) from error
        raise ConfigError(
            f"{run}: there is no module {module_name!r} on this node "
            "(looked in its working directory and PYTHONPATH)"
        ) from error
    except SystemExit as error:
        # A worker that imports it for a claim would end, and the next one, and the node.
        raise ConfigError(f"{run}: importing it exits ({error})") from error
    except Exception as error:
        raise ConfigError(
            f"{run}: importing {module_name!r} failed: {frames.summary(error)}",
            traceback=frames.trace(error),
        ) from error
    for part in class_name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise ConfigError(f"{run}: module {module_name!r} has no class {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ConfigError(f"{run}: {class_name!r} is not a subclass of foundation_nats.Agent")
    handlings(found)
    provided(found)
    subscribed(found)
    check_sensors(found)
    spec_of(run, found)
    try:
        dump_state(first_state(found.State))
    except FoundationError as error:
        raise ConfigError(f"{run}: {error}") from error
    return found


def describe(run: str) -> ClassInfo:
    """What is behind *run* here, error included."""
    try:
        cls = load_class(run)
    except ConfigError as error:
        return ClassInfo(run=run, ok=False, error=str(error))
    said = spec_of(run, cls)
    return ClassInfo(
        run=run,
        ok=True,
        capabilities=provided(cls),
        durable=cls.durable,
        critical=cls.critical,
        doc=(cls.__doc__ or "").strip().split("\n")[0] or None,
        handles=handlings(cls).types(),
        labels=dict(cls.labels),
        subscribe=subscribed(cls),
        resources=said.resources,
        placement=None if cls.placement is None else said.placement,
        restart=cls.restart,
        restart_limit=said.restart_limit,
        rate=said.rate,
        on_node_loss=said.on_node_loss,
    )
