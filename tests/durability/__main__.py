"""Print what faults cost per durability mode, as JSON: ``python -m tests.durability``."""

from __future__ import annotations

import asyncio
import sys

import orjson

from foundation_nats.testing.disks import can_mount
from tests.durability.losses import MODES, table


def main() -> int:
    """The table on stdout; 1 if disks can't be mounted here."""
    reason = can_mount()
    if reason is not None:
        print(f"can't measure: {reason}", file=sys.stderr)
        return 1
    rows = asyncio.run(table(MODES))
    print(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
