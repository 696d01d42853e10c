"""How fast agents are given out after many nodes were lost at once: slowly, so that the survivors keep up.

Pure. A storm is what the failure detector calls so (`cluster/liveness.py`); pacing begins with
it and lasts `control.pace_for_s` from its end, unless a person says that there is no need.
"""

from __future__ import annotations

from foundation_nats.config import ControlConfig


def left_s(now: float, stormed_at: float | None, config: ControlConfig) -> float:
    """For how much longer agents are given out slowly; 0: they aren't.

    Args:
        stormed_at: when the last storm was last seen; None: there was none.
    """
    if stormed_at is None:
        return 0.0
    return max(0.0, stormed_at + config.pace_for_s - now)


def commands_max(left_s: float, alive: int, config: ControlConfig, usual: int) -> int:
    """How many commands one pass may give: while it is paced, some per node that lives."""
    if left_s <= 0:
        return usual
    return min(usual, max(1, alive) * config.pace_per_node)


def pause_s(left_s: float, config: ControlConfig) -> float:
    """How long to wait after a pass that had more to do than it was allowed."""
    return config.pace_every_s if left_s > 0 else 0.0
