"""`foundation why`: the story of an agent, a deployment or a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, run, with_shared

if TYPE_CHECKING:
    from foundation_nats.observe.why import Story


@with_shared
def why(
    shared: Shared,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="An agent, deployment or node; also agent:NAME, deployment:NAME, node:NAME.",
            autocompletion=complete.anything,
        ),
    ],
) -> None:
    """Tell why an agent, a deployment or a node is as it is, and what would change it.

    Example: foundation why visits
    """

    async def main() -> Story:
        async with connected(shared) as cluster:
            return await cluster.why(name)

    story = run(main)
    if not render.document(shared, as_document(story)):
        _show(story)


def as_document(story: Story) -> dict[str, Any]:
    """The object `why -o json` prints."""
    return {"schema": f"{render.SCHEMA}/why", **render.plain(story)}


def _show(story: Story) -> None:
    if story.is_cut:
        render.talk(
            "Older events are not kept, or were not looked at: the beginning may be missing."
        )
    *past, present = story.sentences
    width = max((len(f"#{item.event}") for item in past), default=0)
    for item in past:
        known = ", ".join(f"#{number}" for number in item.because)
        because = f"  ← {known}" if known else ""
        at = item.at.replace("T", " ")[:19]
        number = f"#{item.event}".ljust(width)
        render.write(f"{at}  {number}  {render.clean(item.text)}{because}")
    render.write(f"{'now'.ljust(19)}  {''.ljust(width)}  {render.clean(present.text)}")
    for who, reason in story.reasons.items():
        render.write(f"{''.ljust(19)}  {''.ljust(width)}    {who}: {render.clean(reason)}")
    for text in story.next:
        render.write(f"{'next'.ljust(19)}  {''.ljust(width)}  {render.clean(text)}")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(why)
