"""A child process that is a member of a group, and appends whenever it leads.

``python -m tests.cluster.leading URL MEMBER TTL_S LIFE``. It prints ``joins``, ``leads TERM``, ``put INDEX TERM VALUE``
for what `append` has returned, and ``refused TERM`` when it learns that it leads no more.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats.coordination import leader_follower
from foundation_nats.errors import FoundationError, NotLeaderError
from tests.cluster.children import connect

GROUP = "ledger"


async def main(url: str, member: str, ttl_s: str, life: str) -> None:
    """Take part until killed."""
    cluster = await connect(url, member)
    number = 0
    try:
        async with leader_follower(cluster, GROUP, member=member, ttl_s=float(ttl_s)) as group:
            print("joins", life, flush=True)
            while True:
                term = await group.led()
                print("leads", term, flush=True)
                while True:
                    number += 1
                    value = f"{member}-{life}-{number}"
                    try:
                        entry = await group.append(value, id=value, timeout=2)
                        print("put", entry.index, entry.term, entry.value, flush=True)
                    except NotLeaderError:
                        print("refused", term, flush=True)
                        break
                    except FoundationError as error:
                        print("error", error.code, flush=True)
                        number -= 1  # the same again, under the same id
                    await asyncio.sleep(0.01)
    finally:
        await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
