"""What happens to an activation besides signals and questions: start, rewind, sleep, move, end.

Running means that what `on_start` did is stored and that the agent says it is ready. Before
it sleeps, and before it ends, `on_stop` is run and its effects are stored; what can't be
stored or published in time stays in the record, and the next activation goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
from secrets import token_hex
from typing import Any

from foundation_nats.agent.activation import HIBERNATED, Abandoned, Activation
from foundation_nats.agent.agent import Agent, begin, end
from foundation_nats.agent.calling import call, observed
from foundation_nats.agent.committing import commit, wait_committed
from foundation_nats.agent.effects import checked_state, keep_effects, roll_back
from foundation_nats.agent.failing import handler_error
from foundation_nats.agent.handling import validated
from foundation_nats.agent.kin import announce
from foundation_nats.agent.mailbox import Start
from foundation_nats.agent.sensors.host import begin_sensors
from foundation_nats.agent.signal import Signal
from foundation_nats.base.clock import utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.control.moves import MOVED
from foundation_nats.errors import FoundationError, HandlerError
from foundation_nats.node.blackbox import STARTING
from foundation_schemas import RecoveredFrom

_READY_EVERY_S = 0.1


async def start(activation: Activation) -> None:
    """Run `on_start`, store what it did, wait until the agent is ready, and report it running.

    Raises:
        FoundationError: it can't start, and must end.
    """
    agent = activation.agent
    agent.ctx._begin(None)
    try:
        await observed(activation, begin(agent, activation.recovered), STARTING)
        announce(agent)
        state = checked_state(activation)
    except FoundationError:
        raise
    except Exception as error:
        activation.runtime.log.warning("on_start failed", agent=activation.id, exc_info=error)
        raise handler_error(error, "on_start raised ") from error
    keep_effects(activation, state, seed=f"start-{activation.epoch}")
    if activation.step_ledger is not None and activation.step_ledger.settle(
        f"start-{activation.epoch}"
    ):
        activation.dirty = True
    activation.starting = False
    if activation.dirty:
        # Running means that what on_start did is stored.
        commit(activation)
        await wait_committed(activation)
    if type(agent).ready is not Agent.ready:
        await _get_ready(activation)
    failpoint("report_running")
    activation.runtime.report_running(activation)
    begin_sensors(activation)


async def _get_ready(activation: Activation) -> None:
    timeout = activation.runtime.ready_timeout_s
    try:
        async with asyncio.timeout(timeout):
            while not await observed(activation, activation.agent.ready(), STARTING):
                await asyncio.sleep(_READY_EVERY_S)
    except TimeoutError:
        raise HandlerError(f"It was not ready within {timeout:g} s.") from None
    except Exception as error:
        raise handler_error(error, "ready raised ") from error


async def follow_stream(activation: Activation) -> None:
    """Commit the cursor just before the first signal that is new, and read on from there."""
    await wait_committed(activation)
    place = await activation.runtime.mailboxes.find_place(activation)
    mailbox = activation.mailbox
    before = mailbox.cursor
    if place is not None and place < before:
        mailbox.follow(place)
        # Numbers will come again: what they cause must not get the ids of before.
        activation.salt = token_hex(8)
        if activation.past is not None:
            activation.past.restart()
        activation.cautious = False
        activation.runtime.attempts.pop(activation.id, None)
        activation.dirty = True
        commit(activation)
        await wait_committed(activation)
        activation.runtime.mailboxes.report_rewound(activation, before)
    mailbox.seen = 0
    mailbox.rewinding = False


async def fall_asleep(activation: Activation) -> bool:
    """End as for a stop, but keep the place; False: something came, it goes on."""
    assert activation.mailbox.queue is not None
    if len(activation.mailbox.queue) > 1 or not activation.runtime.is_valid():
        return False
    kind = type(activation.agent)
    if kind.on_stop is not Agent.on_stop or kind.skills:
        activation.agent.ctx._begin(None)
        try:
            await observed(activation, end(activation.agent, HIBERNATED), STARTING)
            keep_effects(
                activation, checked_state(activation), seed=f"sleep-{activation.commit_no}"
            )
        except Exception as error:
            activation.runtime.log.warning("on_stop failed", agent=activation.id, exc_info=error)
            roll_back(activation)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(activation.runtime.stop_timeout_s):
            await wait_committed(activation)
            while activation.outbox:
                await activation.runtime.commits.next_commit(activation)
            if activation.outbox.committed:
                activation.dirty = True
                await wait_committed(activation)
    if (
        activation.outbox
        or activation.dirty
        or activation.in_flight is not None
        or len(activation.mailbox.queue) > 1
    ):
        # Awake again, and for its handlers it has slept.
        activation.starting = True
        activation.recovered = RecoveredFrom(
            node=activation.runtime.node, epoch=activation.epoch, reason=HIBERNATED
        )
        activation.mailbox.queue.insert(1, Start())
        return False
    if activation.stopping is not None or activation.failure is not None:
        return False
    failpoint("sleep.before")
    activation.runtime.lay_down(activation)
    return True


async def finish(activation: Activation) -> None:
    """End it in good order: `on_stop`, the last commit, the outbox. What fails is left behind."""
    assert activation.stopping is not None
    if activation.stopped is not None and activation.stopped.done():
        return
    if activation.route is not None:
        activation.runtime.bus.unsubscribe(activation.route)
    if activation.sensing is not None:
        await activation.sensing.close()
    failpoint("release.before")
    if not activation.starting and activation.failure is None:
        activation.agent.ctx._begin(None)
        try:
            async with asyncio.timeout(5):
                if activation.stopping == MOVED:
                    await _tell_move(activation)
                await end(activation.agent, activation.stopping)
            keep_effects(activation, checked_state(activation), seed=f"stop-{activation.epoch}")
        except (Exception, Abandoned) as error:
            activation.runtime.log.warning("on_stop failed", agent=activation.id, exc_info=error)
            roll_back(activation)
        activation.starting = True  # on_stop runs once
    activation.refuse_queued()
    try:
        async with asyncio.timeout(activation.runtime.stop_timeout_s):
            await wait_committed(activation)
            while activation.outbox:
                await activation.runtime.commits.next_commit(activation)
            if (
                activation.outbox.committed
                and activation.agent.durable
                and activation.runtime.is_valid()
            ):
                activation.dirty = True
                await wait_committed(activation)
    except (TimeoutError, Abandoned):
        pass  # the record holds the outbox; the next activation publishes it
    failpoint("release.after")
    activation.runtime.ended(activation)


async def _tell_move(activation: Activation) -> None:
    """It is about to be moved: the last thing that it hears here."""
    data = {"node": activation.runtime.node, "to": activation.target}
    kind = "cluster.about_to_move"
    id = f"move-{activation.epoch}"
    body = {"id": id, "source": "cluster", "data": data}
    handling = activation.handlings.find(kind, body)
    signal: Signal[Any] = Signal(
        id=id,
        source="cluster",
        type=kind,
        data=validated(handling, kind, data),
        time=utc_text(),
    )
    await call(activation, handling, signal)
    keep_effects(activation, checked_state(activation), seed=id)
    activation.agent.ctx._begin(None)
