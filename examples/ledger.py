"""Three members of a group: one leads and appends, all have the same sum; the leader goes, another one goes on."""

import asyncio
import sys
from contextlib import AsyncExitStack

from foundation_nats import Cluster
from foundation_nats.coordination import leader_follower


def add(total: int, entry: int) -> int:
    return total + entry


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with AsyncExitStack() as stack:
        members = []
        for name in ("ann", "bob", "cy"):
            cluster = await stack.enter_async_context(Cluster.connect(url, name=name))
            group = leader_follower(cluster, "ledger", member=name, apply=add, initial=0)
            members.append(await stack.enter_async_context(group))
            if name == "ann":
                term = await group.led()
        ann, *others = members
        for amount in (5, 7):
            await ann.append(amount)
        for group in others:
            seen = await group.read(max_age=0)
            print(f"{group.member} reads {seen.value}; {seen.leader} leads")
        await ann.close()
        while not (leading := [group for group in others if group.is_leader]):
            await asyncio.sleep(0.05)
        entry = await leading[0].append(30)
        print("entry", entry.index, "in a later term:", entry.term > term)
        print("the sum is", leading[0].view().value)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
