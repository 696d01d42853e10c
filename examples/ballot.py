"""Three people vote on dinner, each from a program of its own; two equal ballots decide."""

import asyncio
import sys

from foundation_nats import Cluster, FoundationError
from foundation_nats.coordination import cast, vote

WISHES = {"ann": "pizza", "bob": "soup", "cy": "pizza"}


async def voter(url: str, name: str) -> None:
    async with Cluster.connect(url, name=name) as cluster:
        for _ in range(100):  # the vote may not be open yet
            try:
                found = await cast(cluster, "dinner", name, WISHES[name])
                print(name, "votes", WISHES[name], "- decided" if found.result else "")
                return
            except FoundationError as error:
                last = error
                await asyncio.sleep(0.05)
        print(name, "could not vote:", last)


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url, name="host") as cluster:
        asking = vote(
            cluster, "dinner", "What shall we eat?", ["pizza", "soup"], list(WISHES), ask=False
        )
        result = asyncio.create_task(asking)
        voters = [asyncio.create_task(voter(url, name)) for name in ("ann", "bob", "cy")]
        found = await result
        for task in voters:
            await task
    print(f"the result: {found.choice}, {found.reason}")


asyncio.run(main(*sys.argv[1:]))
