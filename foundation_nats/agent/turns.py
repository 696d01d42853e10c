"""The loop that works off what an activation has to do: one turn of one runner at a time.

What is queued is done in order, but for urgent signals, which come first. A turn ends when
nothing is left, or when nothing more may be begun: too much is uncommitted, receivers must
take some of what was emitted, the agent takes in no more than it may, or the right to answer
is in doubt. Whoever lifts that calls `Activation.resume`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from foundation_nats.agent.activation import REST_MIN_S, Abandoned, Activation
from foundation_nats.agent.asking import answer_question
from foundation_nats.agent.committing import commit
from foundation_nats.agent.delivering import deliver
from foundation_nats.agent.intake import source_of
from foundation_nats.agent.lifecycle import fall_asleep, finish, follow_stream, start
from foundation_nats.agent.mailbox import Ask, Item, Rewind, Sleep, Start, Stored
from foundation_nats.base.clock import monotonic
from foundation_nats.errors import FoundationError

_UNCOMMITTED_MAX = 256
_COMMIT_EVERY_S = 0.01
"""While there is more to handle: what was handled within that time shares a commit."""


async def take_turn(activation: Activation, task: asyncio.Task[Any]) -> None:
    """Handle what is queued; called by one runner, which is *task*, at a time."""
    if activation.task is not None or activation.route is None:
        return
    activation.task = task
    mailbox, outbox, runtime = activation.mailbox, activation.outbox, activation.runtime
    stored_at = monotonic()
    try:
        while mailbox.queue and activation.stopping is None and not activation.resting:
            if activation.uncommitted >= _UNCOMMITTED_MAX or outbox.look_if_choked(
                runtime.outbox_max, runtime.outbox_max_bytes
            ):
                break
            if activation.dirty and (now := monotonic()) - stored_at > _COMMIT_EVERY_S:
                # Handlers that take their time don't hold up what others wait for.
                stored_at = now
                commit(activation)
            item = mailbox.queue[0]
            first = None
            if mailbox.urgent and not activation.starting:
                first = mailbox.overtaker(item)
            if isinstance(item, Ask) and first is None:
                mailbox.queue.popleft()
                await answer_question(activation, item)
                continue
            if not runtime.is_valid():
                runtime.park(activation)
                break
            if activation.intake is not None and _must_rest(activation, first or item):
                break
            if first is not None:
                activation.overtaking = True
                try:
                    await deliver(activation, first)
                finally:
                    activation.overtaking = False
                continue
            if isinstance(item, Start):
                await start(activation)
            elif isinstance(item, Rewind):
                await follow_stream(activation)
            elif isinstance(item, Sleep):
                if await fall_asleep(activation):
                    mailbox.queue = None
                    return
            elif isinstance(item, Stored):
                await deliver(activation, item)
            if mailbox.queue:
                mailbox.queue.popleft()
    except Abandoned:
        return
    except asyncio.CancelledError:
        if activation.stopping is None:
            raise
        task.uncancel()
    except FoundationError as error:
        activation.fail(error)
        return
    finally:
        activation.task = None
    if mailbox.queue is not None and not mailbox.queue:
        mailbox.queue = mailbox.urgent = None
    commit(activation)
    if activation.stopping is not None:
        await finish(activation)
    elif mailbox.behind and mailbox.backlog <= runtime.in_memory_max // 2:
        runtime.mailboxes.catch_up(activation)


def _must_rest(activation: Activation, item: Item) -> bool:
    """Whether *item* must not begin yet; then the queue is gone on with as soon as it may."""
    if (
        activation.intake is None
        or not isinstance(item, Stored)
        or activation.mailbox.is_over(item.sequence)
    ):
        return False
    wait = activation.intake.wait_s(source_of(item.data), monotonic())
    if wait:
        activation.resting = True
        asyncio.get_running_loop().call_later(max(wait, REST_MIN_S), _rested, activation)
    return bool(wait)


def _rested(activation: Activation) -> None:
    activation.resting = False
    activation.resume()
