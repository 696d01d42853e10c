"""A chat session: it streams its answers, remembers the talk through crashes, sleeps when nobody talks."""

import asyncio
import sys
from collections.abc import AsyncIterator

from foundation_nats import Agent, Cluster, Signal, State, on


class Session(Agent):
    hibernate_after = 60.0

    class State(State):
        turns: list[tuple[str, str]] = []  # noqa: RUF012  pydantic copies it

    @on("say")
    async def say(self, signal: Signal[str]) -> AsyncIterator[str]:
        words: list[str] = []
        async for word in think([text for who, text in self.state.turns if who == "you"]):
            words.append(word)
            yield word  # if the asker goes away now nothing was said
        turn = [("you", signal.data), ("me", " ".join(words))]
        self.state.turns = [*self.state.turns, *turn][-100:]


async def think(said: list[str]) -> AsyncIterator[str]:
    """In place of a model."""
    answer = f"You said {said[-1]!r} before." if said else "Hello. I will remember that."
    for word in answer.split():
        yield word


async def main(url: str = "nats://127.0.0.1:4222", *texts: str) -> None:
    async with Cluster.connect(url) as cluster:
        await cluster.agents.start("examples.chat:Session", id="chat-ann", timeout=20)
        for text in texts or ("I like tea",):
            print(*[word async for word in cluster.ask_stream("chat-ann", "say", text, timeout=10)])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
