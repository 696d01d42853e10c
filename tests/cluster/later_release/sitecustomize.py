"""Makes a process one of a later release, as far as others can tell: all that it writes has fields that they don't know.

Put this directory on ``PYTHONPATH`` and set ``FOUNDATION_TEST_RELEASE=2``; without the
variable nothing changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

LATER = b',"later":{"fields":[1,{"nested":null}]}}'


def _later(plain: Callable[..., bytes]) -> Callable[..., bytes]:
    def encode(*arguments: Any, **more: Any) -> bytes:
        encoded = plain(*arguments, **more)
        return encoded if encoded == b"{}" else encoded.removesuffix(b"}") + LATER

    return encode


if os.environ.get("FOUNDATION_TEST_RELEASE") == "2":
    # Before anybody imports them by name.
    from foundation_nats.bus import rpc

    rpc.encode = _later(rpc.encode)

    from foundation_nats.signaling import envelope

    envelope.encode_envelope = _later(envelope.encode_envelope)

    from foundation_nats.agent import record

    record.encode_record = _later(record.encode_record)
