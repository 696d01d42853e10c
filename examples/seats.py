"""A seat plan that processes agree on: two want the same seat at once, one of them gets it."""

import asyncio
import sys

from pydantic import BaseModel

from foundation_nats import Cluster, Domain


class Book(BaseModel):
    seat: str
    by: str


class Plan(BaseModel):
    taken: dict[str, str] = {}


class Seats(Domain[Plan, Book]):
    name, State, Operation = "seats", Plan, Book

    def validate(self, state: Plan, operation: Book) -> str | None:
        return f"{operation.seat} is taken" if operation.seat in state.taken else None

    def apply(self, state: Plan, operation: Book) -> Plan:
        state.taken[operation.seat] = operation.by
        return state


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as here, Cluster.connect(url) as there:
        both = ((here, "ann"), (there, "bob"))
        bids = (one.consensus.propose(Seats, Book(seat="1A", by=name)) for one, name in both)
        for found in await asyncio.gather(*bids):
            print(found.status, "at revision", found.revision, found.reason)


asyncio.run(main(*sys.argv[1:]))
