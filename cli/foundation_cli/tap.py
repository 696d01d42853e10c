"""Commands that look on without touching: `tap` live traffic, `events` what happened.

Read only, and endless until Ctrl-C (exit code 130) or until the reader of the
pipe goes away. With ``-o json`` each line is one JSON document.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Output, Shared, connected, run, with_shared

_PAYLOAD_MAX = 200
_NO_SEQUENCE = 1 << 62
"""What a tap gives to items that have none."""


def _emit(shared: Shared, value: Any, line: str) -> None:
    match shared.format:
        case Output.JSON:
            render.print_line(value)
        case Output.YAML:
            render.write("---")
            render.print_yaml(value)
        case Output.TABLE:
            render.write(line)


def tap_item(item: Any) -> dict[str, Any]:
    """A `TapItem` as the JSON object `tap -o json` prints."""
    return {
        "at": item.at,
        "kind": item.kind,
        "type": item.type,
        "agent": item.agent,
        "subject": item.subject,
        "sequence": item.sequence if item.sequence < _NO_SEQUENCE else None,
        "body": render.plain(item.body),
    }


def tap_line(item: dict[str, Any]) -> str:
    """A tapped item as one line for people."""
    moment, body = clock(item["at"]), item["body"]
    head = f"{moment}  {render.clean(item['kind']):<6}"
    if item["kind"] == "event" and "topic" in body and "what" in body:
        return f"{head}  {event_text(body)}"
    letter = body if item["kind"] == "dead" else {}
    signal = (letter.get("signal") or {}) if letter else body
    payload = render.json_text(signal["data"]) if signal.get("data") is not None else ""
    if len(payload) > _PAYLOAD_MAX:
        payload = payload[:_PAYLOAD_MAX] + "…"
    who = render.clean(item["agent"] or signal.get("subject") or item["subject"])
    parts = [head, who, render.clean(item["type"]), payload]
    if signal.get("source"):
        parts.append(f"from {render.clean(signal['source'])}")
    if letter.get("reason"):
        parts.append(f"given up: {render.clean(letter['reason'])}")
    return "  ".join(part for part in parts if part)


def event_text(event: dict[str, Any]) -> str:
    """An event without its time."""
    name = f"{event['topic']}.{event['what']}"
    return (
        f"{render.clean(name):<22}  {render.clean(event.get('message'))}"
        f"  ({render.clean(event.get('source'))})"
    )


def clock(text: str | None) -> str:
    """The time of day in an RFC 3339 time, in UTC."""
    if text and "T" in text:
        return render.clean(text.partition("T")[2][:12].rstrip("Z"))
    return render.clean(text)


@with_shared
def tap(
    shared: Shared,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]",
            help="A subject or type; * is one word, > the rest: 'counter.*'.",
        ),
    ] = None,
    type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Only this type of signal.")
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only this agent.", autocompletion=complete.agents),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODE", help="Only agents of this node.", autocompletion=complete.nodes
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="EXPR", help="Only where it holds: 'data.amount > 10'."),
    ] = None,
    replay: Annotated[
        float | None,
        typer.Option(
            metavar="SINCE",
            parser=values.duration,
            help="First what happened since then, such as 10m.",
        ),
    ] = None,
) -> None:
    """Watch signals, asks and events as they happen.

    It only looks on, and ends with Ctrl-C.

    Example: foundation tap --agent visits --replay 10m -o json
    """

    async def main() -> None:
        async with connected(shared) as cluster:
            if node is not None:
                await cluster.taps.prepare()
            opened = cluster.taps.open(
                pattern, type=type, agent=agent, node=node, where=where, replay_s=replay
            )
            async with opened as items:
                async for item in items:
                    found = tap_item(item)
                    _emit(shared, found, tap_line(found))

    run(main)


@with_shared
def events(
    shared: Shared,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")
    ] = False,
    since: Annotated[
        float | None,
        typer.Option(metavar="SINCE", parser=values.duration, help="Only since then, such as 10m."),
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(
            metavar="TOPIC",
            help="Only one of node, agent, leader, deployment, worker, cluster, resources, domain, "
            "signal, election, breaker.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="At most the last N.")
    ] = 200,
) -> None:
    """Show what happened in the cluster, oldest first.

    The last 7 days are kept.

    Example: foundation events --since 1h --topic node
    """

    def line(event: dict[str, Any]) -> str:
        return f"{render.clean(event['at'])}  {event_text(event)}"

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            if not follow:
                found: list[dict[str, Any]] = render.plain(
                    await cluster.events.list(since_s=since, topic=topic, limit=limit)
                )
                return found
            stream = cluster.events.follow()
            if since is not None:
                for event in await cluster.events.list(since_s=since, topic=topic, limit=limit):
                    value = render.plain(event)
                    _emit(shared, value, line(value))
            async for event in stream:
                value = render.plain(event)
                if topic is None or value["topic"] == topic:
                    _emit(shared, value, line(value))
            return []

    found = run(main)
    if follow or render.document(shared, found):
        return
    if not found:
        render.talk("No events.")
    for event in found:
        render.write(line(event))


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command()(tap)
    app.command()(events)
