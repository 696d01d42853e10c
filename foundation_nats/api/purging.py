"""`purge`: forget the state, the mailboxes and the timers of agents that a deployment had and doesn't want any more.

IO: reads the lists of keys and mailboxes, and deletes. Agents are found by what is
stored of them, not by what was done last, so that a purge that was interrupted is
completed by the next one. An agent that is wished for, or that a node may still run,
is never purged; state goes by compare-and-set, so that one that starts anew meanwhile
keeps what it has claimed.

Not guaranteed: that a signal which is sent to such an agent meanwhile is removed, too.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from foundation_nats.agent.past import PLACES, base_key
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import StreamReader
from foundation_nats.errors import NotSettledError, SignalNotFoundError, StaleRevisionError
from foundation_schemas import AgentStatus

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_CHUNK = 512


def belongs(agent: str, deployment: str) -> bool:
    """Whether *agent* is an id that the deployment gives to its agents."""
    return agent == deployment or re.fullmatch(re.escape(deployment) + r"-\d+", agent) is not None


async def purge(cluster: Cluster, name: str) -> list[str]:
    """Delete state and mailboxes of the deployment's former agents; returns their ids.

    Raises:
        NotSettledError: a node may still run some of them; nothing was deleted.
        BusUnavailableError, BusTimeoutError: some may have been deleted; purge again.
    """
    bus, subjects = cluster.bus, cluster.subjects
    state = Bucket(bus, subjects, "state")
    signals = StreamReader(bus, subjects.signals_stream)
    # What is stored is read before wishes and records: an agent that claims its state later has
    # changed it by then, and one that claimed it before has a record that says so.
    keys = [
        key[len(state.subject("")) :] for key in await state.reader.subjects(state.subject("*"))
    ]
    bases = {
        key[len(state.subject("")) :] for key in await state.reader.subjects(state.subject("*.*"))
    }
    revisions = await _revisions(state, [agent for agent in keys if belongs(agent, name)])
    boxes = await signals.subjects(subjects.mailboxes())
    written = {box[len(subjects.mailbox("")) :] for box in boxes}
    last = int((await signals.info())["state"]["last_seq"])
    wanted = {
        agent
        for wish in (await cluster.deployments.wishes()).values()
        for agent in wish.agent_ids()
    }
    chosen = sorted(
        agent
        for agent in revisions.keys() | written
        if belongs(agent, name) and agent not in wanted
    )
    active = {
        info.id
        for info in await cluster.agents.list()
        if info.status != AgentStatus.STOPPED and info.node is not None
    }
    if still := [agent for agent in chosen if agent in active]:
        raise NotSettledError(
            f"{len(still)} agents of {name} have not ended yet, such as {still[0]}: "
            "nothing was purged.",
            hint="Purge again once they have.",
            left=still[:1000],
        )
    purged = []
    for agent in chosen:
        if agent in revisions:
            try:
                await state.delete(agent, expected=revisions[agent])
            except StaleRevisionError:
                continue  # it runs again, and this is its own by now
            for place in range(PLACES):
                if base_key(agent, place) in bases:
                    await state.delete(base_key(agent, place))
        await _cancel_timers(cluster, agent)
        if agent in written:
            await signals.purge(subjects.mailbox(agent), below=last + 1)
        purged.append(agent)
    return purged


async def _cancel_timers(cluster: Cluster, agent: str) -> None:
    """End what the agent wanted to be sent later."""
    for timer in await cluster.signals.schedules(agent):
        with contextlib.suppress(SignalNotFoundError):  # it has fired for the last time
            await cluster.signals.cancel(timer.name)


async def _revisions(state: Bucket, agents: list[str]) -> dict[str, int]:
    """The revision of each agent's state, where it has one."""
    found: dict[str, int] = {}
    for start in range(0, len(agents), _CHUNK):
        entries = await state.read_many(agents[start : start + _CHUNK], by_now=True)
        found.update(
            {entry.key: entry.revision for entry in entries.values() if entry.value is not None}
        )
    return found


__all__ = ["belongs", "purge"]
