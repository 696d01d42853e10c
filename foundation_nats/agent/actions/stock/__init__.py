"""Actions that are there: control flow, arithmetic, clocks, files, HTTP. See docs/actions.md."""

from foundation_nats.agent.actions.stock.clock import date_add, date_diff, now
from foundation_nats.agent.actions.stock.control import branch, fail, for_each, noop, sleep
from foundation_nats.agent.actions.stock.files import ListFiles, ReadFile, WriteFile
from foundation_nats.agent.actions.stock.http import Http
from foundation_nats.agent.actions.stock.maths import calculate

__all__ = [
    "Http",
    "ListFiles",
    "ReadFile",
    "WriteFile",
    "branch",
    "calculate",
    "date_add",
    "date_diff",
    "fail",
    "for_each",
    "noop",
    "now",
    "sleep",
]
