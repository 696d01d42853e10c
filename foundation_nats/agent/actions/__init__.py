"""Actions: what an agent can do, with typed params and results. See docs/actions.md."""

from foundation_nats.agent.actions.action import Action, FunctionAction, action, as_action
from foundation_nats.agent.actions.catalogue import CATALOGUE, actions_of, find_action
from foundation_nats.agent.actions.running import ActionContext, Instruction, execute, run_action

__all__ = [
    "CATALOGUE",
    "Action",
    "ActionContext",
    "FunctionAction",
    "Instruction",
    "action",
    "actions_of",
    "as_action",
    "execute",
    "find_action",
    "run_action",
]
