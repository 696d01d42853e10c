"""Three agents count the words of 3,000 lines, a chunk at a time; each chunk is counted exactly once."""

import asyncio
import sys
from collections import Counter

from foundation_nats import Agent, Cluster, Signal, on
from foundation_nats.coordination import map_reduce


class Words(Agent):
    @on("map")
    async def map(self, signal: Signal) -> dict[str, int]:
        return Counter(word for line in signal.data["items"] for word in line.split())


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    lines = ("the sea the sky" if n % 3 else "a red fish" for n in range(3000))
    async with Cluster.connect(url) as cluster:
        for number in range(3):
            await cluster.agents.start(
                "examples.wordcount:Words", id=f"words-{number}", capabilities=["count-words"]
            )
        found = await map_reduce(cluster, "words-of-may", lines, "count-words", "merge", chunk=100)
    print(*(f"{word}: {found[word]}" for word in sorted(found)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
