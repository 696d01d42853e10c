"""A child process that campaigns, and writes to a fenced resource while it believes to lead.

``python -m tests.cluster.campaigner URL NAME TTL_S``. It prints ``leads TERM``
when elected, ``refused TERM`` when the resource refused it, ``lost TERM`` when it
knows that its tenure is over, and campaigns again.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats.consensus.domain import ProposalStatus
from foundation_nats.errors import FoundationError
from tests.cluster.children import connect
from tests.cluster.domains import FencedResource, Put


async def main(url: str, name: str, ttl_s: str) -> None:
    """Campaign until killed."""
    cluster = await connect(url, name)
    try:
        election = cluster.leases.election("boss", candidate=name, ttl_s=float(ttl_s))
        while True:
            term = await election.campaign()
            print("leads", term, flush=True)
            while not election.lost.is_set():
                # A careless leader: it seldom asks whether it still leads. The fence must hold.
                for _ in range(20):
                    try:
                        put = Put(token=term, by=name)
                        found = await cluster.consensus.propose(FencedResource, put, timeout=2)
                        if found.status is ProposalStatus.REJECTED:
                            print("refused", term, flush=True)
                    except FoundationError as error:
                        print("error", error.code, flush=True)
                    await asyncio.sleep(0.01)
            print("lost", term, flush=True)
            await election.resign()
    finally:
        await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
