"""An order is cancelled by a plan; the stock refuses the parcel, so the refund is taken back, once."""

import asyncio
import sys

from foundation_nats import ActionContext, Agent, Cluster, Plan, Signal, State, action, on, ref
from foundation_nats.errors import PlanFailedError

BANK: list[str] = []


async def charge_again(params, result: str, ctx: ActionContext) -> None:
    await ctx.once("charge", BANK.append, f"charged {params.amount} again")


@action(undo=charge_again, retries=2, timeout=10)
async def refund(order: str, amount: int, ctx: ActionContext) -> str:
    """Give money back."""
    await ctx.once("refund", BANK.append, f"refunded {amount}")
    return f"receipt of {order}"


@action
async def restock(order: str, receipt: str) -> None:
    """Take the parcel back."""
    if order.endswith("broken"):
        raise ValueError("it is broken")


cancel = (
    Plan("cancel")
    .step("refund", refund, {"order": ref("input").order, "amount": ref("input").amount})
    .step("restock", restock, {"order": ref("input").order, "receipt": ref("refund")})
    .returning(ref("refund"))
)


class Shop(Agent):
    actions = (refund, restock, cancel)  # also answers action.cancel, and capability:cancel

    class State(State):
        cancelled: dict[str, str] = {}  # noqa: RUF012  pydantic copies it

    @on("order.cancel")
    async def on_cancel(self, signal: Signal[dict]) -> list[str]:
        try:
            outcome = await self.ctx.run(cancel, signal.data)
        except PlanFailedError as error:
            outcome = str(error)
        self.state.cancelled[signal.data["order"]] = outcome
        return [outcome, *BANK]


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        await cluster.agents.start("examples.refunds:Shop", id="shop")
        for order in ("o-1", "o-2-broken"):
            for line in await cluster.ask("shop", "order.cancel", {"order": order, "amount": 5}):
                print(line)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
