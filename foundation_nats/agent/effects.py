"""Keeps what a handler did, for the next commit; or takes it back.

The effects of one cause are kept all together, or not at all: the state, what was emitted,
what was ordered of children and sensors. Nothing of it is stored or leaves here; that is
`committing.py`'s.
"""

from __future__ import annotations

from typing import Any

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.context import Emission
from foundation_nats.agent.emissions import outbox_items
from foundation_nats.agent.middleware import outgoing
from foundation_nats.agent.record import OutboxItem
from foundation_nats.agent.sensors.host import order_sensors
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.state import dump_state, restore_state
from foundation_nats.errors import PayloadTooLargeError, StateTooLargeError


def checked_state(activation: Activation) -> bytes:
    """The agent's state as it is to be stored.

    Raises:
        StateTooLargeError
        StateInvalidError: it can't be stored.
    """
    state = dump_state(activation.agent.state)
    if len(state) > activation.runtime.state_max_bytes:
        raise StateTooLargeError(
            f"The state of {activation.id} would be {len(state):,} bytes; the limit is "
            f"{activation.runtime.state_max_bytes:,}. Nothing was stored.",
            hint="Keep large data elsewhere, or split the agent.",
        )
    return state


def roll_back(activation: Activation) -> None:
    """Take back what the handler has changed: it never ran."""
    activation.agent.state = restore_state(activation.agent.state, activation.state_json)
    activation.agent.ctx._emissions = []
    activation.agent.ctx._family = activation.agent.ctx._family_kept


def keep_effects(
    activation: Activation, state: bytes, *, seed: str, signal: Signal[Any] | None = None
) -> None:
    """Keep what a handler did, for the next commit; all of it, or an error and nothing.

    *seed* is the same whenever this cause is handled again, and of no other cause.
    """
    context = activation.agent.ctx
    if context._emissions and activation.agent._layers:
        context._emissions = outgoing(
            activation.agent._layers, activation.agent, context._emissions
        )
    items = (
        _emitted_items(activation, context._emissions, seed, signal) if context._emissions else ()
    )
    for item in items:
        activation.outbox.add(item)
        activation.emitted += 1
        activation.dirty = True
    context._emissions = []
    if context._family is not context._family_kept:
        context._family_kept = context._family
        activation.dirty = True
    if context._sensor_orders:
        orders, context._sensor_orders = context._sensor_orders, None
        order_sensors(activation, orders)
    if state != activation.state_json:
        activation.state_json = state
        activation.dirty = True
        if activation.past is not None and (signal is None or not signal.sequence):
            activation.past.aside()
    if context._stop_reason is not None and activation.stopping is None:
        reason, context._stop_reason = context._stop_reason, None
        activation.runtime.stop_one(activation, reason)


def _emitted_items(
    activation: Activation, emissions: list[Emission], seed: str, signal: Signal[Any] | None
) -> list[OutboxItem]:
    runtime = activation.runtime
    items = outbox_items(
        runtime.subjects,
        activation.id,
        emissions,
        salt=activation.salt,
        seed=seed,
        emitted=activation.emitted,
        signal=signal,
    )
    size = sum(len(item.body) for item in items)
    if size > runtime.emit_max_bytes:
        raise PayloadTooLargeError(
            f"{activation.id} emitted {size:,} bytes for one signal; "
            f"the limit is {runtime.emit_max_bytes:,}.",
            hint="Emit references to the data, or spread it over several signals.",
        )
    return items
