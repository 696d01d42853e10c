"""Agents that vote, bid, and take part in sagas and queues; they write down what happened to them."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field

from foundation_nats import Agent, Signal, State, on, subscribe
from foundation_nats.coordination import barrier, vote


class Voter(Agent):
    """Votes as its configuration says; ``slow`` seconds later, if that is there."""

    class State(State):
        asked: list[str] = Field(default_factory=list)
        results: list[str | None] = Field(default_factory=list)

    @on("vote.question")
    async def question(self, signal: Signal[dict[str, Any]]) -> Any:
        await asyncio.sleep(self.config.get("slow", 0))
        self.state.asked.append(signal.data["vote"])
        if self.config.get("fail"):
            raise RuntimeError("no opinion")
        return self.config.get("choice")

    @on("vote.result")
    async def result(self, signal: Signal[dict[str, Any]]) -> None:
        self.state.results.append(signal.data["result"].get("choice"))

    @on("story")
    async def story(self, signal: Signal) -> dict[str, Any]:
        return self.state.model_dump()


@subscribe("vote.*")
class Listener(Agent):
    """No voter; hears how votes end by their topic."""

    class State(State):
        results: list[str | None] = Field(default_factory=list)

    @on("vote.result")
    async def result(self, signal: Signal[dict[str, Any]]) -> None:
        self.state.results.append(signal.data["result"].get("choice"))

    @on("story")
    async def story(self, signal: Signal) -> dict[str, Any]:
        return self.state.model_dump()


class Bidder(Agent):
    """Bids as its configuration says; writes down what it was awarded."""

    class State(State):
        announced: list[str] = Field(default_factory=list)
        offered: list[str] = Field(default_factory=list)
        awarded: list[str] = Field(default_factory=list)

    @on("auction.announce")
    async def announce(self, signal: Signal[dict[str, Any]]) -> Any:
        await asyncio.sleep(self.config.get("thinks", 0))
        self.state.announced.append(signal.data["auction"])
        return self.config.get("bid")

    @on("auction.offer")
    async def offer(self, signal: Signal[dict[str, Any]]) -> bool:
        await asyncio.sleep(self.config.get("slow", 0))
        self.state.offered.append(signal.data["auction"])
        return not self.config.get("declines", False)

    @on("auction.award")
    async def award(self, signal: Signal[dict[str, Any]]) -> None:
        self.state.awarded.append(signal.data["auction"])

    @on("story")
    async def story(self, signal: Signal) -> dict[str, Any]:
        return self.state.model_dump()


class Desk(Agent):
    """Books and unbooks for sagas, and does the items of queues; writes down each."""

    class State(State):
        log: list[str] = Field(default_factory=list)
        broken: bool = True

    @on("book")
    async def book(self, signal: Signal[str]) -> dict[str, str]:
        await asyncio.sleep(self.config.get("slow", 0))
        if self.config.get("full"):
            raise RuntimeError("full")
        self.state.log.append(f"book {signal.data}")
        return {"booking": f"{self.id}/{signal.data}"}

    @on("unbook")
    async def unbook(self, signal: Signal[dict[str, Any]]) -> None:
        await asyncio.sleep(self.config.get("slow", 0))
        if self.config.get("stubborn") and self.state.broken:
            raise RuntimeError("stubborn")
        result = signal.data["result"] or {}
        self.state.log.append(f"unbook {signal.data['data']} {result.get('booking')}")

    @on("repair")
    async def repair(self, signal: Signal) -> None:
        self.state.broken = False

    @on("do")
    async def do(self, signal: Signal[dict[str, Any]]) -> None:
        self.state.log.append(f"{signal.data['key']} {signal.data['data']}")

    @on("meet")
    async def meet(self, signal: Signal) -> int:
        return await barrier(self.ctx, "meeting", ["d1", "d2"], party=self.id).wait(timeout=20)

    @on("ballot")
    async def ballot(self, signal: Signal[list[str]]) -> str | None:
        name = f"ballot-{signal.id}"
        return (await vote(self.ctx, name, "?", ["yes", "no"], signal.data, timeout=20)).choice

    @on("log")
    async def get(self, signal: Signal) -> list[str]:
        return self.state.log
