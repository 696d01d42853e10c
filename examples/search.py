"""A search that answers hit by hit: the reader takes five and leaves, and the agent stops looking."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

from foundation_nats import Agent, Cluster, Signal, State, on


class Library(Agent):
    class State(State):
        finished: int = 0

    @on("find")
    async def find(self, signal: Signal[str]) -> AsyncIterator[str]:
        for shelf in range(self.config["shelves"]):
            await asyncio.sleep(0.001)  # it takes its time to look
            if shelf % 7 == 0:
                yield f"{signal.data} on shelf {shelf}"
        self.state.finished += 1  # kept only if the reader has stayed to the end

    @on("finished")
    async def get_finished(self, signal: Signal) -> int:
        return self.state.finished


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        library = await cluster.agents.start(Library, id="library", config={"shelves": 50})
        async with aclosing(library.ask_stream("find", "maps", window=2)) as hits:
            for _ in range(5):
                print(await anext(hits))
        print(len([hit async for hit in library.ask_stream("find", "tea")]), "in all")
        print("finished", await library.ask("finished"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
