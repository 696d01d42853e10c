"""Is a history of one object linearizable? The search of Wing and Gong, with Lowe's memory (invariants 5 and 13).

Sources: J. Wing and C. Gong, *Testing and verifying concurrent objects* (1993);
G. Lowe, *Testing for linearizability* (2017): configurations (what is linearized,
state) that were seen once are not searched again. Histories are split by key
first, because linearizability is local (Herlihy and Wing, 1990).

An operation of unknown outcome may take effect at any time after its
invocation, or never: it gets no end. The search is bounded by `steps_max`; what
it can't decide within is undecided, and never called good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.history import Operation

_NEVER = 1 << 62
_STEPS_MAX = 2_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """A sequential object."""

    initial: Hashable
    step: Callable[[Any, str, Any, Any, bool], tuple[bool, Any]]
    """(state, f, value, result, result is known) to (possible, next state)."""


def _register_step(state: Any, f: str, value: Any, result: Any, is_known: bool) -> tuple[bool, Any]:
    match f:
        case "read":
            return (not is_known or result == state), state
        case "write":
            return True, value
        case "cas":
            expected, new = value
            if not is_known:
                return True, (new if state == expected else state)
            return (state == expected) == bool(result), (new if result else state)
        case _:
            raise ValueError(f"a register has no {f!r}")


REGISTER = Model(None, _register_step)
"""read → value; write(value); cas((expected, new)) → whether it was done. Begins with None."""


def without_unseen(items: list[Operation]) -> list[Operation]:
    """Drop unknown writes that nobody can have noticed: they may as well never have happened.

    Each of them would double the search. A failed ``cas`` notices that it was not
    the expected value, whatever it was, so what precedes one stays.
    """
    seen: set[Any] = set()
    noticed_until = -1
    for item in items:
        if item.f == "read":
            seen.add(item.result)
        elif item.f == "cas":
            seen.add(item.value[0])
            if item.outcome == "ok" and not item.result:
                noticed_until = max(noticed_until, item.completed_ns or _NEVER)
    return [
        item
        for item in items
        if item.outcome == "ok"
        or item.invoked_ns <= noticed_until
        or (item.value[1] if item.f == "cas" else item.value) in seen
    ]


def check_linearizable(
    operations: Iterable[Operation], model: Model = REGISTER, *, steps_max: int = _STEPS_MAX
) -> Judgement:
    """Search, key by key, for an order that explains what the clients saw.

    Operations of outcome ``fail`` did not happen and are left out.
    """
    judgement = Judgement("linearizability", 5)
    by_key: dict[str, list[Operation]] = {}
    for operation in operations:
        judgement.looked_at += 1
        if operation.outcome == "fail" or (operation.outcome != "ok" and operation.f == "read"):
            continue
        by_key.setdefault(operation.key, []).append(operation)
    for key, items in sorted(by_key.items()):
        found = search(without_unseen(items) if model is REGISTER else items, model, steps_max)
        if found is None:
            judgement.undecided.append(f"{key}: more than {steps_max:,} steps")
        elif isinstance(found, Operation):
            judgement.violated(f"{key}: no order explains {_text(found)}")
    return judgement


def _text(operation: Operation) -> str:
    return (
        f"{operation.process} {operation.f} {operation.value!r} -> {operation.result!r} "
        f"[{operation.invoked_ns / 1e9:.4f} s, {operation.took_ms:.1f} ms]"
    )


class _Node:
    """A call or a return in the list of events."""

    __slots__ = ("match", "next", "number", "operation", "previous")

    def __init__(self, operation: Operation, number: int) -> None:
        self.operation = operation
        self.number = number
        self.match: _Node | None = None  # of a call: its return
        self.previous: _Node | None = None
        self.next: _Node | None = None


def search(items: list[Operation], model: Model, steps_max: int) -> bool | Operation | None:
    """True: linearizable. An operation: none is, and the search never got past it. None: too long."""
    head = _linked(items)
    state: Any = model.initial
    done = 0
    seen: set[tuple[int, Hashable]] = set()
    stack: list[tuple[_Node, Any]] = []
    required = sum(1 << n for n, item in enumerate(items) if _end(item) < _NEVER)
    farthest, culprit = -1, items[0] if items else None
    node = head.next
    steps = 0
    while done & required != required:
        steps += 1
        if steps > steps_max:
            return None
        assert node is not None
        if node.match is not None:
            operation = node.operation
            possible, after = model.step(
                state, operation.f, operation.value, operation.result, operation.outcome == "ok"
            )
            reached = (done | 1 << node.number, after)
            if possible and reached not in seen:
                seen.add(reached)
                stack.append((node, state))
                state, done = after, reached[0]
                _lift(node)
                node = head.next
            else:
                node = node.next
            continue
        # The return of an operation that is not linearized yet: something before was wrong.
        if (place := done.bit_count()) > farthest:
            farthest, culprit = place, node.operation
        if not stack:
            return culprit if culprit is not None else True
        node, state = stack.pop()
        done &= ~(1 << node.number)
        _unlift(node)
        node = node.next
    return True


def _end(operation: Operation) -> int:
    if operation.outcome == "ok" and operation.completed_ns is not None:
        return operation.completed_ns
    return _NEVER


def _linked(items: list[Operation]) -> _Node:
    events: list[tuple[int, int, _Node]] = []
    for number, operation in enumerate(items):
        call, answer = _Node(operation, number), _Node(operation, number)
        call.match = answer
        # Calls before returns at the same instant: they may overlap.
        events.append((operation.invoked_ns, 0, call))
        events.append((_end(operation), 1, answer))
    events.sort(key=lambda event: event[:2])
    head = last = _Node(Operation("", "", ""), -1)
    for _, _, node in events:
        last.next, node.previous = node, last
        last = node
    return head


def _lift(call: _Node) -> None:
    for node in (call, call.match):
        assert node is not None
        assert node.previous is not None
        node.previous.next = node.next
        if node.next is not None:
            node.next.previous = node.previous


def _unlift(call: _Node) -> None:
    for node in (call.match, call):
        assert node is not None
        assert node.previous is not None
        node.previous.next = node
        if node.next is not None:
            node.next.previous = node
