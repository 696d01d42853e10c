"""Whether a node that comes and goes is trusted with agents.

Pure. What counts is how many of its lives in a row ended soon after they had begun, which its
record carries from one life to the next, and how long the present one has lasted.
"""

from __future__ import annotations

from foundation_nats.config import ControlConfig


def is_flapping(short_lives: int, lived_s: float | None, config: ControlConfig) -> bool:
    """Whether it gets agents only where no other node can take them.

    Args:
        lived_s: how long the present life has lasted; None: nobody knows, so it is young.
    """
    if short_lives < config.flapping_after:
        return False
    return lived_s is None or lived_s < config.stable_after_s
