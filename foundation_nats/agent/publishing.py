"""Publishes what was emitted, once it is stored: the shell around `Outbox`.

One signal per receiver is on its way at a time. Whoever may not answer at the moment
publishes nothing either: it has perhaps been replaced, and then its successor does, from
the record.
"""

from __future__ import annotations

from collections.abc import Sequence

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.record import OutboxItem
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.streams import PubAck
from foundation_nats.errors import FoundationError

_NOT_VALID_S = 0.2
"""Between two looks whether what is stored may be published again."""


def publish(activation: Activation, items: Sequence[OutboxItem]) -> None:
    """Publish stored items that are not on their way yet, in order per receiver.

    While it is not known which of the recovered ones were published before, all wait.
    """
    for subject in activation.outbox.line_up(items):
        publish_head(activation, subject)


def publish_recovered(activation: Activation) -> None:
    """Publish what the record of the earlier activation had not yet published."""
    # Not the whole outbox: what was emitted since and is not stored must not leave.
    publish(activation, activation.outbox.release())


def publish_head(activation: Activation, subject: str) -> None:
    """Try the head of *subject*'s line, if there is one (once more)."""
    item = activation.outbox.head(subject)
    if item is None or activation.failure is not None:
        return
    runtime = activation.runtime
    if not runtime.is_valid():
        # Perhaps replaced long ago: then the successor publishes it, from the record.
        runtime.post.publish_again_after(_NOT_VALID_S, activation, subject)
        return

    def on_ack(ack: PubAck | FoundationError) -> None:
        if isinstance(ack, PubAck):
            failpoint("outbox.mid")
            _acknowledged(activation, subject, item)
        else:
            runtime.post.publish_later(activation, subject, item, ack)

    runtime.post.append(subject, item, on_ack)


def publish_late(activation: Activation, subject: str, item: OutboxItem, is_stored: bool) -> None:
    """The stream was searched for the head of *subject*'s line: go on with what it said."""
    if activation.failure is not None or activation.outbox.head(subject) is not item:
        return
    if is_stored:
        _acknowledged(activation, subject, item)
    else:
        publish_head(activation, subject)


def _acknowledged(activation: Activation, subject: str, item: OutboxItem) -> None:
    outbox = activation.outbox
    if outbox.acknowledged(subject, item) is not None:
        publish_head(activation, subject)
        if outbox.choked and not activation.is_choked():
            activation.resume()
        return
    if outbox.is_all_out():
        failpoint("outbox.after")
        activation.runtime.commits.committed(activation)
        if outbox.committed and activation.agent.durable:
            activation.runtime.commits.clear_later(activation)
    if activation.stopping is not None or activation.mailbox.queue:
        activation.resume()
