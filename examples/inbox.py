"""An inbox: each CSV file that is put into a directory is added up once, also if nobody ran when it came."""

import asyncio
import csv
import sys
from pathlib import Path

from foundation_nats import Agent, Cluster, RecoveredFrom, Signal, State, on
from foundation_nats.agent.sensors import FileWatch


class Inbox(Agent):
    class State(State):
        files: int = 0
        total: float = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        watch = FileWatch(
            self.config["path"], match="*.csv", remember=True, settle_s=0.3, emit="file"
        )
        self.ctx.start_sensor(watch)

    @on("file")
    async def file(self, signal: Signal[dict]) -> None:
        if signal.data["change"] == "added":
            self.state.total += await self.ctx.run_blocking(add_up, signal.data["path"])
            self.state.files += 1


def add_up(path: str) -> float:
    with open(path, newline="") as file:
        return sum(float(row["amount"]) for row in csv.DictReader(file))


async def main(url: str = "nats://127.0.0.1:4222", path: str = ".") -> None:
    async with Cluster.connect(url) as cluster:
        config = {"path": str(Path(path).resolve())}
        await cluster.agents.start("examples.inbox:Inbox", id="inbox", config=config)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
