"""A model answers with the help of a tool. Without a URL of a model, a scripted one on this machine is asked.

python -m examples.assistant nats://127.0.0.1:4222 [https://api.openai.com/v1 MODEL]
"""

import asyncio
import sys
from contextlib import AsyncExitStack

from pydantic import Field

from foundation_nats import Agent, Cluster, Signal, State, action, on
from foundation_nats.agent.strategies import ChatModel, Conversation, ToolLoop
from foundation_nats.testing import ScriptedModel, Use


@action
async def weather(city: str) -> str:
    """The weather in a city."""
    return {"Vienna": "rain", "Rome": "sun"}.get(city, "unknown")


class Assistant(Agent):
    actions = (weather,)
    loop = ToolLoop(ChatModel(model="scripted"), system="Be brief.", rounds=6, tokens=20_000)

    class State(State):
        chat: Conversation = Field(default_factory=Conversation)

    @on("say")
    async def say(self, signal: Signal[str]) -> str:
        return await self.loop.run(self, signal.data, self.state.chat)


def compare(messages: list[dict]) -> str:
    told = [message["content"] for message in messages if message["role"] == "tool"]
    return f"Vienna has {told[0]}, Rome has {told[1]}."


async def main(url: str = "nats://127.0.0.1:4222", model: str = "", name: str = "") -> None:
    async with AsyncExitStack() as stack:
        if not model:
            script = [
                [Use("weather", {"city": "Vienna"}), Use("weather", {"city": "Rome"})],
                compare,
            ]
            scripted = await stack.enter_async_context(ScriptedModel(script))
            model, name = scripted.url, "scripted"
        cluster = await stack.enter_async_context(Cluster.connect(url))
        config = {"model": {"url": model, "model": name}}
        await cluster.agents.start("examples.assistant:Assistant", id="ann", config=config)
        print(await cluster.ask("ann", "say", "Where does it rain, Vienna or Rome?", timeout=60))
        state = (await cluster.agents.state("ann"))["state"]
        print(*(message["role"] for message in state["chat"]["messages"]))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
