"""The entry point of worker processes: a node's worker that hosts agents.

Run by the manager as ``python -m foundation_nats.api.worker``.
"""

from __future__ import annotations

import gc
import sys

from foundation_nats.agent.runtime import Runtime
from foundation_nats.base.tasks import run
from foundation_nats.node.worker import serve


def main() -> None:
    """Be a worker until the manager ends."""
    # Thousands of long-lived agents make full collections long and fruitless.
    gc.set_threshold(50_000, 20, 50)
    sys.exit(run(lambda: serve(Runtime)))


if __name__ == "__main__":
    main()
