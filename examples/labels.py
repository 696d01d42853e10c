"""Photos pass three stages at agents; one is broken, and fails at the second stage with the reason."""

import asyncio
import sys

from foundation_nats import Agent, Cluster, Signal, State, on
from foundation_nats.coordination import pipeline


class Stage(Agent):
    class State(State):
        done: int = 0

    @on("work")
    async def work(self, signal: Signal) -> str:
        if self.id == "shrink" and "broken" in signal.data:
            raise ValueError("not a photo")
        self.state.done += 1
        return f"{signal.data} {self.id}"


STAGES = [{"name": s, "agent": s, "type": "work"} for s in ("fetch", "shrink", "label")]


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        for stage in STAGES:
            await cluster.agents.start("examples.labels:Stage", id=stage["agent"])
        photos = ["sea.jpg", "broken.jpg", "sky.jpg"]
        async with pipeline(cluster, "photos-of-may", STAGES, photos) as run:
            async for result in run:  # in order; each takes effect once at each stage
                failed = f"failed at {result.stage}: {result.error}"
                print(result.item, failed if result.stage else result.value)
            print(run.progress.done, "done,", run.progress.failed, "failed")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
