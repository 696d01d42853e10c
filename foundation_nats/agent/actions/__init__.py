"""Actions: what an agent can do, with typed params and results. See docs/actions.md."""

from foundation_nats.agent.actions.action import Action, FunctionAction, action, as_action
from foundation_nats.agent.actions.catalogue import CATALOGUE, actions_of, find_action
from foundation_nats.agent.actions.plan import Plan, PlanStep, chain
from foundation_nats.agent.actions.refs import Ref, ref
from foundation_nats.agent.actions.running import ActionContext, Instruction, execute, run_action

__all__ = [
    "CATALOGUE",
    "Action",
    "ActionContext",
    "FunctionAction",
    "Instruction",
    "Plan",
    "PlanStep",
    "Ref",
    "action",
    "actions_of",
    "as_action",
    "chain",
    "execute",
    "find_action",
    "ref",
    "run_action",
]
