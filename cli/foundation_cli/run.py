"""Commands that take part in the coordination patterns, for shells: JSON values in, one JSON line out.

``foundation run barrier|vote|cast|auction|saga|pipeline|map-reduce|leader-follower|put|work|dead``, and those of
`holding`. What they start survives them: the same command again, with the same id, goes on where an interrupted one was, or
repeats its result.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import typer
import typer.core

from foundation_cli import holding, render, values
from foundation_cli.connection import (
    Output,
    Shared,
    connected,
    group_callback,
    run,
    with_shared,
)

_HELP = """Patterns among agents, programs and shells: rights, meetings, decisions, streams of work, queues.

The same command with the same id goes on with an interrupted one, or repeats its result.
"""


def _wait(text: str, what: str) -> Any:
    return Annotated[
        float,
        typer.Option(
            "--wait", metavar="DURATION", parser=values.duration, help=what, show_default=text
        ),
    ]


def _say(shared: Shared, value: dict[str, Any], text: str) -> None:
    """One line: for people, or JSON."""
    if shared.format is Output.JSON:
        render.print_line(value)
    elif not render.document(shared, value):
        render.write(text)


def _notes(shared: Shared, reasons: dict[str, str]) -> None:
    """Who did not take part, for people."""
    if shared.format is Output.TABLE:
        for who, why in reasons.items():
            render.talk(f"{render.styled('!', 'yellow', sys.stderr)} {who}: {render.clean(why)}")


@with_shared
def barrier(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The barrier's name.")],
    parties: Annotated[
        str,
        typer.Option(metavar="N|NAMES", help="How many wait at it, or who: 3 or a,b,c."),
    ],
    party: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", help="Who we are; needed where the parties are names."
        ),
    ] = None,
    generation: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Which one is meant; one that is over is reported."),
    ] = None,
    wait: _wait("1m", "After so long the generation breaks, for all.") = "1m",  # type: ignore
) -> None:
    """Wait until all parties have come; prints the generation that ended.

    Example: foundation run barrier deploy --parties api,web --as api --wait 5m
    """
    who: int | list[str]
    who = int(parties) if parties.isdigit() else [p.strip() for p in parties.split(",")]

    async def main() -> int:
        from foundation_nats.coordination import barrier as make

        async with connected(shared) as cluster:
            return await make(cluster, name, who, party=party, timeout=wait).wait(
                generation=generation
            )

    ended = run(main)
    found = {"barrier": name, "generation": ended}
    _say(shared, found, f"generation {ended} of {name} has ended")


def _weights(items: list[str]) -> dict[str, float]:
    pairs = [item if "=" in item else f"{item}=1" for item in items]
    return values.numbers(pairs, "--voter")


def _quorum(text: str) -> Any:
    if text in ("majority", "all"):
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not majority, all or a number.") from None


@with_shared
def vote(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The vote's id.")],
    choice: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="One of the choices; repeat it.")
    ] = None,
    voter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=WEIGHT]", help="An agent, or with --cast anybody; repeat it."),
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="JSON", help="What is asked; - reads stdin.")
    ] = None,
    quorum: Annotated[
        str,
        typer.Option(
            metavar="majority|all|N", parser=_quorum, help="What a choice needs of all weight."
        ),
    ] = "majority",
    cast_only: Annotated[
        bool, typer.Option("--cast", help="Ask no agents: voters use `foundation run cast`.")
    ] = False,
    wait: _wait("10s", "How long the vote is open.") = "10s",  # type: ignore
) -> None:
    """Put a question to agents, or to whoever casts, and print the result.

    With the name alone it waits for the result of a vote that exists.

    Example: foundation run vote ship-2 --choice yes --choice no --voter qa --voter ops=2
    """
    payload = values.json_value(question, sys.stdin)
    weights = _weights(voter or [])
    if bool(choice) != bool(weights):
        raise typer.BadParameter("A new vote needs both --choice and --voter.")

    async def main() -> Any:
        from foundation_nats.coordination import vote as put
        from foundation_nats.coordination import vote_result

        async with connected(shared) as cluster:
            if not choice:
                return await vote_result(cluster, name, timeout=wait)
            return await put(
                cluster,
                name,
                payload,
                choice,
                weights,
                quorum=quorum,  # type: ignore[arg-type]
                ask=not cast_only,
                timeout=wait,
            )

    result = render.plain(run(main))
    counts = ", ".join(f"{render.clean(c)} {n:g}" for c, n in result["counts"].items())
    chosen = "no decision" if result["choice"] is None else render.clean(result["choice"])
    _say(shared, {"vote": name, **result}, f"{chosen}: {result['reason']} ({counts})")
    _notes(shared, result["unavailable"])


@with_shared
def cast(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The vote's id.")],
    voter: Annotated[str, typer.Argument(metavar="VOTER", help="Who votes.")],
    choice: Annotated[
        str | None, typer.Argument(metavar="[CHOICE]", help="What for; without it: abstain.")
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why.")] = "",
) -> None:
    """Give a ballot; a repeat counts once.

    Example: foundation run cast ship-2 ann yes
    """

    async def main() -> Any:
        from foundation_nats.coordination import cast as put

        async with connected(shared) as cluster:
            return await put(cluster, name, voter, choice, reason=reason, timeout=shared.timeout_s)

    result = run(main).result
    found = {"vote": name, "voter": voter, "choice": choice, "result": render.plain(result)}
    end = "" if result is None else f"; that decides it: {result.choice or 'no decision'}"
    what = "abstains" if choice is None else f"votes {render.clean(choice)}"
    _say(shared, found, f"{render.clean(voter)} {what}{end}")


@with_shared
def auction(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The auction's id.")],
    bidder: Annotated[
        list[str], typer.Option(metavar="AGENT", help="An agent that may bid; repeat it.")
    ],
    task: Annotated[
        str | None, typer.Option(metavar="JSON", help="What is to be done; - reads stdin.")
    ] = None,
    key: Annotated[
        str, typer.Option(metavar="FIELD", help="The number in each bid of which the lowest wins.")
    ] = "cost",
    wait: _wait("5s", "How long bids are taken.") = "5s",  # type: ignore
    accept: Annotated[
        float,
        typer.Option(
            "--accept",
            metavar="DURATION",
            parser=values.duration,
            help="How long each that is offered the award has to accept.",
            show_default="5s",
        ),
    ] = "5s",  # type: ignore[assignment]
) -> None:
    """Let agents bid for a task, and award it to the best that accepts; ends with 1 if nobody does.

    Example: foundation run auction job-17 --task '{"file": "a.csv"}' --bidder w1 --bidder w2
    """
    payload = values.json_value(task, sys.stdin)

    async def main() -> Any:
        from foundation_nats.coordination import auction as hold

        async with connected(shared) as cluster:
            return await hold(
                cluster, name, payload, bidder, key=key, timeout=wait, accept_timeout=accept
            )

    result = render.plain(run(main))
    winner = result["winner"]
    text = f"{winner} gets it for {render.json_text(result['bid'])}" if winner else "no award"
    _say(shared, {"auction": name, **result}, text)
    _notes(shared, result["refused"])
    if winner is None:
        raise typer.Exit(render.FAILED)


def _steps(text: str | None) -> list[Any] | None:
    """A list of steps, or one per line."""
    if text is None:
        return None
    if text == "-":
        text = sys.stdin.read()
    is_list = text.lstrip().startswith("[")
    parts = [text] if is_list else [line for line in text.splitlines() if line.strip()]
    read = [values.json_value(part) for part in parts]
    found = read[0] if is_list else read
    if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
        raise typer.BadParameter(
            "Steps are objects, one per line or in a list: "
            '{"name": "a", "agent": "ID", "type": "book", "undo": "unbook"}.'
        )
    return found


@with_shared
def saga(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The saga's id.")],
    steps: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEPS]",
            help="JSON: objects with name, agent, type, and perhaps data, undo, timeout_s; one per "
            "line or a list; - reads stdin. Without: go on with one that exists.",
        ),
    ] = None,
    wait: _wait("5m", "How long to wait; the saga goes on at the next call.") = "5m",  # type: ignore
) -> None:
    """Run steps at agents one after the other; where one fails, undo those before it, in reverse.

    Ends with 0 if all is done, 1 if it was undone or is stuck, 5 if it is not over in time.

    Example: foundation run saga trip-17 - < steps.jsonl
    """
    wanted = _steps(steps)

    async def main() -> Any:
        from foundation_nats.coordination import saga as go

        async with connected(shared) as cluster:
            return await go(cluster, name, wanted, timeout=wait)

    record = run(main)
    parts = zip(record.steps, record.progress, strict=True)
    found = {
        "saga": name,
        "state": str(record.state),
        "error": record.error,
        "steps": [
            {"name": s.name, "agent": s.agent, "state": str(p.state), "result": p.result}
            for s, p in parts
        ],
    }
    why = f": {render.clean(record.error)}" if record.error else ""
    _say(shared, found, f"{name} is {record.state}{why}")
    if shared.format is Output.TABLE:
        for step in found["steps"]:
            render.write(f"  {step['name']} at {step['agent']}: {step['state']}")
    if record.state != "done":
        raise typer.Exit(render.FAILED)


_LINES_HELD = 1024


async def _lines() -> AsyncIterator[Any]:
    """Each line of stdin as JSON, read by a thread: it may come slowly, and never end."""
    import asyncio
    import threading

    loop = asyncio.get_running_loop()
    found: asyncio.Queue[str | None] = asyncio.Queue()
    room = threading.Semaphore(_LINES_HELD)

    def hand_over(line: str | None) -> None:
        loop.call_soon_threadsafe(found.put_nowait, line)

    def read() -> None:
        try:
            for line in sys.stdin:
                room.acquire()
                hand_over(line)
            hand_over(None)
        except RuntimeError:
            return  # the loop has ended before the input

    # A daemon: nothing can end a thread that waits for stdin.
    threading.Thread(target=read, name="stdin", daemon=True).start()
    number = 0
    while (line := await found.get()) is not None:
        room.release()
        number += 1
        if line.strip():
            try:
                yield values.json_value(line)
            except typer.BadParameter as error:
                raise typer.BadParameter(f"Line {number} of stdin: {error.message}") from None


def _items(text: str) -> Any:
    if text == "-":
        return _lines()
    found = values.json_value(text)
    if not isinstance(found, list):
        raise typer.BadParameter("Items are a JSON list, or - for one per line of stdin.")
    return found


def _stage(text: str, **common: Any) -> dict[str, Any]:
    """``NAME=AGENT[,AGENT…]:TYPE``, or JSON."""
    if text.lstrip().startswith("{"):
        return {**common, **values.json_value(text)}
    name, is_named, rest = text.partition("=")
    agents, has_type, type = rest.rpartition(":")
    if not (is_named and has_type and agents and type):
        raise typer.BadParameter(
            f"{text!r} is no stage: write NAME=AGENT[,AGENT…]:TYPE.", param_hint="--stage"
        )
    names = [agent.strip() for agent in agents.split(",")]
    return {"name": name, "agents": names, "type": type, **common}


@contextlib.asynccontextmanager
async def _noting(what: Callable[[], str]) -> AsyncIterator[None]:
    """Say on stderr once what is waited for, each time that it becomes another thing."""
    import asyncio

    async def look() -> None:
        said = ""
        while True:
            await asyncio.sleep(_NOTE_S)
            if (now := what()) != said and now:
                render.talk(f"waiting at {render.clean(now)}")
            said = now

    looking = asyncio.create_task(look(), name="cli.noting")
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


_NOTE_S = 0.5


@with_shared
def pipeline(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The run's id.")],
    items: Annotated[
        str,
        typer.Argument(metavar="[ITEMS]", help="A JSON list; -: each line of stdin is an item."),
    ] = "-",
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AGENT[,AGENT…]:TYPE", help="The stages in their order; repeat it."
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(metavar="N", min=1, help="So many items at a time.")
    ] = 256,
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often a stage may refuse an item.")
    ] = 0,
    stage_timeout: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="A stage without an answer for so long has failed.",
            show_default="1m",
        ),
    ] = "1m",  # type: ignore[assignment]
    backoff: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="Before an item is asked anew; twice as long each time.",
            show_default="0s",
        ),
    ] = "0s",  # type: ignore[assignment]
    retry_late: Annotated[
        bool,
        typer.Option("--retry-late", help="No answer in time is an attempt, as a refusal is."),
    ] = False,
) -> None:
    """Send items through stages at agents; prints one line per item, in order; 1 if some have failed.

    AGENT is an id, capability:NAME, any:NAME or deployment:NAME.

    After an interruption the same command, with the same input, goes on; lines that were printed just
    before it may be printed again, with the same numbers.

    Example: foundation run pipeline scan-7 --stage fetch=f1,f2:fetch --stage scan=scanner:scan < urls.jsonl
    """
    common = {
        "timeout_s": stage_timeout,
        "retries": retries,
        "backoff_s": backoff,
        "on_timeout": "retry" if retry_late else "fail",
    }
    stages = [_stage(text, **common) for text in stage or []]
    source = _items(items)

    async def main() -> int:
        from foundation_nats.coordination import pipeline as make

        failed = 0
        async with (
            connected(shared) as cluster,
            make(cluster, name, stages, source, in_flight=in_flight) as going,
            _noting(lambda: going.progress.waits),
        ):
            async for result in going:
                failed += bool(result.stage)
                found = {"item": result.item, "value": result.value}
                if result.stage:
                    found = {"item": result.item, "stage": result.stage, "error": result.error}
                text = (
                    f"{result.item}: failed at {result.stage}: {render.clean(result.error)}"
                    if result.stage
                    else f"{result.item}: {render.json_text(result.value)}"
                )
                _say(shared, found, text)
            if shared.format is Output.TABLE:
                now = going.progress
                render.talk(f"{now.done} items done, {now.failed} failed")
            return failed

    if run(main):
        raise typer.Exit(render.FAILED)


@with_shared
def map_reduce(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The job's id.")],
    items: Annotated[
        str,
        typer.Argument(metavar="[ITEMS]", help="A JSON list; -: each line of stdin is an item."),
    ] = "-",
    mapper: Annotated[
        str, typer.Option(metavar="CAPABILITY", help="What agents provide that map.")
    ] = "map",
    reduce: Annotated[
        str,
        typer.Option(
            metavar="sum|min|max|merge|agent:ID", help="How what the chunks make is put together."
        ),
    ] = "merge",
    chunk: Annotated[int, typer.Option(metavar="N", min=1, help="Items per question.")] = 1000,
    combine: Annotated[
        str | None,
        typer.Option(
            metavar="sum|min|max|merge",
            help="With --reduce agent:ID: put so many as eight chunks together before.",
        ),
    ] = None,
    straggler: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="After so long an idle mapper gets the chunk too.",
            show_default="10s",
        ),
    ] = "10s",  # type: ignore[assignment]
    partial: Annotated[
        bool, typer.Option("--partial", help="Print partial results, too, one line each.")
    ] = False,
    wait: _wait("1h", "How long to wait; the job goes on at the next call.") = "1h",  # type: ignore
) -> None:
    """Let agents map items in chunks, count each chunk once, and print what they make together.

    After an interruption the same command, with the same input, goes on.

    Example: foundation run map-reduce words-7 --mapper count-words --reduce merge < lines.jsonl
    """
    source = _items(items)

    async def main() -> Any:
        from foundation_nats.coordination import map_reduce as go

        is_noted = False

        def tell(now: Any) -> None:
            nonlocal is_noted
            if not now.mappers and not is_noted:
                is_noted = True
                render.talk(f"no agent that runs provides {mapper} yet: waiting for one")
            if partial:
                found = {"job": name, "items": now.items, "total": now.total, "partial": now.value}
                _say(shared, found, f"{now.items} items: {render.json_text(now.value)}")

        async with connected(shared) as cluster:
            return await go(
                cluster,
                name,
                source,
                mapper,
                reduce,
                chunk=chunk,
                combine=combine,
                straggler_s=straggler,
                on_progress=tell,
                timeout=wait,
            )

    result = run(main)
    _say(shared, {"job": name, "result": result}, render.json_text(result))


@with_shared
def leader_follower(
    shared: Shared,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The group's name.")],
    entries: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENTRIES]",
            help="With --as: append these once we lead, and end; a JSON list, or - for one per line of stdin.",
        ),
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Who we are; without it we only look on."),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Print the entries behind N first; else new ones."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="End after so many entries.")
    ] = None,
    ttl: Annotated[
        float,
        typer.Option(
            "--ttl",
            metavar="DURATION",
            parser=values.duration,
            help="How long the others wait for a leader that died.",
            show_default="15s",
        ),
    ] = "15s",  # type: ignore[assignment]
    read: Annotated[
        bool, typer.Option("--read", help="Print what the group knows, in one line, and end.")
    ] = False,
    max_age: Annotated[
        float,
        typer.Option(
            "--max-age",
            metavar="DURATION",
            parser=values.duration,
            help="With --read: it may be so old; 0s: all that was appended before.",
            show_default="0s",
        ),
    ] = "0s",  # type: ignore[assignment]
    apply: Annotated[
        str | None,
        typer.Option(
            metavar="sum|min|max|merge",
            help="What the entries make together; the same for all members.",
        ),
    ] = None,
    initial: Annotated[
        str | None, typer.Option(metavar="JSON", help="With --apply: before the first entry.")
    ] = None,
) -> None:
    """Follow a group's log, one line per entry; as a member also stand for leader, and append.

    With --read: print index, term, leader, age and the newest entry, and with --apply the value.

    Example: foundation run leader-follower ledger --after 0
    Example: foundation run leader-follower ledger --read --max-age 1s --apply sum --initial 0
    Example: foundation run leader-follower ledger - --as a < entries.jsonl
    """
    if entries is not None and member is None:
        raise typer.BadParameter("Only a member appends: say who we are.", param_hint="--as")
    if read and (entries is not None or member is not None):
        raise typer.BadParameter(
            "Who reads does not take part: give it alone.", param_hint="--read"
        )
    source = None if entries is None else _items(entries)
    begin = values.json_value(initial)

    def show(entry: Any) -> None:
        found = {"group": name, **render.plain(entry)}
        _say(shared, found, f"{entry.index} (term {entry.term}): {render.json_text(entry.value)}")

    def tell(view: Any, newest: Any) -> None:
        found = {"group": name, **render.plain(view), "newest": render.plain(newest)}
        if apply is None:
            del found["value"]
        value = "" if apply is None else f"{render.json_text(view.value)} "
        text = f"{value}at {view.index} (term {view.term}, {view.leader or 'nobody'} leads), {view.age_s:.3f} s old"
        _say(shared, found, text)

    async def main() -> None:
        from foundation_nats.coordination import leader_follower as make
        from foundation_nats.coordination.map_reduce import FOLDS

        if apply is not None and apply not in FOLDS:
            raise typer.BadParameter(f"{apply!r} is none of {', '.join(FOLDS)}.")
        fold = None if apply is None else FOLDS[apply]
        async with (
            connected(shared) as cluster,
            make(cluster, name, member=member, ttl_s=ttl, apply=fold, initial=begin) as group,
        ):
            if read:
                view = await group.read(max_age=max_age, timeout=shared.timeout_s)
                tell(view, group.newest)
                return
            done = 0
            if source is None:
                async for entry in group.entries(after=after):
                    show(entry)
                    done += 1
                    if done == count:
                        return
            async for value in _each(source):
                show(await _append(group, value))
                done += 1
                if done == count:
                    return

    run(main)


async def _each(source: Any) -> AsyncIterator[Any]:
    """Of a list, or of what comes line by line."""
    if isinstance(source, list):
        for item in source:
            yield item
    else:
        async for item in source:
            yield item


async def _append(group: Any, value: Any) -> Any:
    """Append once we lead, and again under the same id while the outcome is unknown."""
    import asyncio
    from secrets import token_hex

    from foundation_nats.errors import BusError, NotLeaderError, ProposalUnknownError

    id = f"cli.{token_hex(8)}"
    is_noted = False
    while True:
        if not group.is_leader and not is_noted:
            is_noted = True
            render.talk(f"waiting to lead; now it is {group.leader or 'nobody'}")
        await group.led()
        try:
            return await group.append(value, id=id)
        except NotLeaderError:
            is_noted = False
        except (BusError, ProposalUnknownError) as error:
            render.talk(f"{render.styled('!', 'yellow', sys.stderr)} {render.clean(str(error))}")
            await asyncio.sleep(0.2)


_Queue = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue's name.")]


@with_shared
def put(
    shared: Shared,
    queue: _Queue,
    items: Annotated[
        str, typer.Argument(metavar="[ITEM]", help="JSON; -: each line of stdin is one.")
    ] = "-",
    key: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|.FIELD", help="Of one key the order is kept; .FIELD of each item."
        ),
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", metavar="TEXT|.FIELD", help="Repeats of an id count once.")
    ] = None,
) -> None:
    """Put items into a queue; prints the id of each.

    Example: foundation run put jobs - --key .customer < jobs.jsonl
    """
    lines = sys.stdin if items == "-" else [items]

    async def main() -> None:
        from foundation_nats.coordination import workqueue

        async with connected(shared) as cluster:
            jobs = workqueue(cluster, queue)
            for line in lines:
                if line.strip():
                    item = values.json_value(line)
                    which, name = _field(item, key, "--key"), _field(item, id, "--id")
                    stored = await jobs.put(item, key=which, id=name, timeout=shared.timeout_s)
                    _say(shared, {"queue": queue, "id": stored, "key": which}, stored)

    run(main)


def _field(item: Any, text: str | None, option: str) -> str | None:
    if text is None or not text.startswith("."):
        return text
    name = text[1:]
    if not isinstance(item, dict) or name not in item:
        raise typer.BadParameter(
            f"The item {render.json_text(item)[:60]} has no {name!r}.", param_hint=option
        )
    return str(item[name])


@with_shared
def work(
    shared: Shared,
    queue: _Queue,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND…]", help="Run for each item, which it reads from stdin."
        ),
    ] = None,
    feed: Annotated[
        str | None,
        typer.Option(
            metavar="AGENT", help="Let an agent do them instead; {key} stands for the key."
        ),
    ] = None,
    type: Annotated[
        str, typer.Option(metavar="TYPE", help="With --feed: the type of the signals.")
    ] = "queue.item",
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="So many at a time.")] = 1,
    drain: Annotated[bool, typer.Option("--drain", help="End when the queue is empty.")] = False,
) -> None:
    """Do the items of a queue: a command that ends with 0 has done its item; else it is tried again.

    Without a command items are printed, one JSON line each, and count as done.

    Example: foundation run work jobs --drain -- ./convert.sh
    """
    if command and feed:
        raise typer.BadParameter("Give a command or --feed, not both.")

    async def one(item: Any) -> None:
        import asyncio

        found = {"id": item.id, "key": item.key, "data": item.data, "attempt": item.attempt}
        if not command:
            render.print_line(found)
            return
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        try:
            await process.communicate(render.json_text(found).encode() + b"\n")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            why = f"{command[0]} ended with {process.returncode}"
            mark = render.styled("!", "yellow", sys.stderr)
            render.talk(f"{mark} {render.clean(item.id)}, attempt {item.attempt}: {why}")
            raise RuntimeError(why)

    async def main() -> int:
        from foundation_nats.coordination import workqueue

        async with connected(shared) as cluster:
            jobs = workqueue(cluster, queue)
            if feed is None:
                return await jobs.work(one, concurrency=concurrency, drain=drain)
            return await jobs.feed(
                lambda item: feed.format(key=item.key), type, concurrency=concurrency, drain=drain
            )

    done = run(main)
    render.talk(f"{done} items done")


@with_shared
def dead(
    shared: Shared,
    queue: _Queue,
    replay: Annotated[
        int | None, typer.Option(metavar="N", help="Put this one into the queue again.")
    ] = None,
) -> None:
    """List a queue's dead letters, or put one into the queue again.

    Example: foundation run dead jobs --replay 17
    """

    async def main() -> Any:
        from foundation_nats.coordination import workqueue

        async with connected(shared) as cluster:
            jobs = workqueue(cluster, queue)
            return await jobs.dead() if replay is None else await jobs.replay(replay)

    found = run(main)
    if replay is not None:
        _say(shared, {"queue": queue, "id": found}, f"put again as {found}")
    elif not render.document(shared, render.plain(found)):
        render.table(_DEAD, render.plain(found), empty="No dead letters.")


_DEAD = (
    render.Column("n", lambda d: d["sequence"], right=True),
    render.Column("id", lambda d: d["item"]["id"]),
    render.Column("key", lambda d: d["item"]["key"]),
    render.Column("attempts", lambda d: d["attempts"], right=True),
    render.Column("age", lambda d: render.age(d["at"])),
    render.Column("reason", lambda d: d["reason"], free=True),
)


_SECTIONS: dict[str, tuple[Callable[..., None], ...]] = {
    "Only one, or so many, at a time": (holding.lock, holding.semaphore, holding.election),
    "Together": (barrier, vote, cast, auction, leader_follower, holding.counter),
    "Work through agents": (saga, pipeline, map_reduce),
    "Queues": (put, work, dead),
}


class _Sections(typer.core.TyperGroup):
    """A group whose help says what its commands are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """In the sections above."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        limit = formatter.width - 6 - max(map(len, found))
        for heading, functions in _SECTIONS.items():
            names = [function.__name__.replace("_", "-") for function in functions]
            with formatter.section(heading):
                formatter.write_dl(
                    [(n, c.get_short_help_str(limit)) for n in names if (c := found[n]) is not None]
                )


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="run",
        cls=_Sections,
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for functions in _SECTIONS.values():
        for function in functions:
            group.command()(function)
    app.add_typer(group)
