"""What an agent knows of its children, who has ended for good, and both in a harness."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats import Agent, Signal, State, on
from foundation_nats.agent.family import (
    Supervision,
    children,
    exited,
    find,
    spawned,
    started,
    stopping,
)
from foundation_nats.agent.kin import ChildExited, ChildStarted, child_id
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.cluster.registry import Held
from foundation_nats.control.children import end_child, wish_child
from foundation_nats.control.kinship import Bury, End, TellOrphan, decide, kin_id, owner_of
from foundation_nats.errors import ConfigError, FencedError
from foundation_nats.testing import AgentHarness, TestCluster
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    ChildStatus,
    Deployment,
    Ending,
    FamilyRecord,
    ParentLink,
)

AT = "2026-01-01T00:00:00+00:00"
GROUP = Supervision(strategy="one_for_all", max_restarts=2, within_s=60)
REST = Supervision(strategy="rest_for_one", max_restarts=2, within_s=60)


def family_of(*tags: str, keep: bool = True, restart: str = "transient") -> FamilyRecord:
    """A family whose children run."""
    family = FamilyRecord()
    for tag in tags:
        family, _ = spawned(
            family, tag, f"p_{tag}", run="m:C", restart=restart, digest=tag, wish={}, keep=keep
        )
        known = find(family, tag)
        assert known is not None
        family = started(family, tag, known.order).family
    return family


def order_of(family: FamilyRecord, tag: str) -> int:
    """The order that started this child."""
    known = find(family, tag)
    assert known is not None
    return known.order


def statuses(family: FamilyRecord) -> dict[str, str]:
    """The children by tag."""
    return {tag: str(child.status) for tag, child in children(family).items()}


# ---- a family -----------------------------------------------------------------------------


def test_a_child_is_ordered_once_and_changed_by_other_arguments() -> None:
    """The order's number stays, so that what comes from it is still heard."""
    family, orders = spawned(
        FamilyRecord(), "a", "p_a", run="m:C", restart="transient", digest="1", wish={"x": 1}
    )
    assert [(item.verb, item.order) for item in orders] == [("start", 1)]
    again = spawned(family, "a", "p_a", run="m:C", restart="transient", digest="1", wish={"x": 1})
    assert again == (family, [])
    family, orders = spawned(
        family, "a", "p_a", run="m:C", restart="transient", digest="2", wish={"x": 2}
    )
    assert [(item.order, item.wish) for item in orders] == [(1, {"x": 2})]
    with pytest.raises(ConfigError, match="child 'a' already"):
        spawned(family, "b", "p_a", run="m:C", restart="transient", digest="1", wish={})
    with pytest.raises(ConfigError, match="stop it first"):
        spawned(family, "a", "other", run="m:C", restart="transient", digest="1", wish={})


def test_what_is_repeated_or_of_another_order_is_no_news() -> None:
    """Each start and each end is heard once."""
    family = family_of("a", keep=False)
    order = order_of(family, "a")
    assert not started(family, "a", order).is_news
    assert not exited(family, "a", order + 1, "stopped", "", Supervision(), AT).is_news
    heard = exited(family, "a", order, "stopped", "", Supervision(), AT)
    assert heard.is_news
    assert heard.family.children == []
    assert not exited(heard.family, "a", order, "stopped", "", Supervision(), AT).is_news


def test_one_that_is_spawned_while_it_ends_comes_back_under_a_new_order() -> None:
    """After its end was heard; to stop it meanwhile takes that back."""
    family, orders = stopping(family_of("a", keep=False), "a", "enough")
    assert [item.verb for item in orders] == ["stop"]
    more, none = spawned(
        family, "a", "p_a", run="m:C", restart="transient", digest="2", wish={"new": 1}
    )
    assert none == []
    heard = exited(more, "a", 1, "stopped", "", Supervision(), AT)
    assert [(item.verb, item.order, item.wish) for item in heard.orders] == [
        ("start", 2, {"new": 1})
    ]
    taken_back, _ = stopping(more, "a", "enough")
    assert exited(taken_back, "a", 1, "stopped", "", Supervision(), AT).family.children == []


def test_one_for_all_ends_the_group_backwards_and_starts_it_forwards() -> None:
    """Once all have ended, under new orders."""
    family = family_of("a", "b", "c")
    heard = exited(family, "b", order_of(family, "b"), "failed", "boom", GROUP, AT)
    assert [(item.verb, item.tag) for item in heard.orders] == [("stop", "c"), ("stop", "a")]
    assert statuses(heard.family) == {"a": "stopping", "b": "waiting", "c": "stopping"}
    family = heard.family
    heard = exited(family, "c", order_of(family, "c"), "stopped", "", GROUP, AT)
    assert heard.orders == ()
    heard = exited(heard.family, "a", order_of(family, "a"), "stopped", "", GROUP, AT)
    assert [(item.verb, item.tag, item.order) for item in heard.orders] == [
        ("start", "a", 4),
        ("start", "b", 5),
        ("start", "c", 6),
    ]


def test_rest_for_one_leaves_those_that_were_started_before() -> None:
    """As OTP has it."""
    family = family_of("a", "b", "c")
    heard = exited(family, "b", order_of(family, "b"), "failed", "boom", REST, AT)
    assert [(item.verb, item.tag) for item in heard.orders] == [("stop", "c")]
    assert statuses(heard.family) == {"a": "running", "b": "waiting", "c": "stopping"}


def test_too_many_restarts_end_the_group_and_the_parent_where_it_is_told_to() -> None:
    """Two within a minute are allowed; the third is not, unless the first is long ago."""
    stop = Supervision(strategy="one_for_all", max_restarts=2, within_s=60, on_exhausted="stop")
    family = family_of("a")
    for second in (0, 30):
        at = f"2026-01-01T00:00:{second:02}+00:00"
        heard = exited(family, "a", order_of(family, "a"), "failed", "boom", stop, at)
        assert heard.give_up is None
        family = started(heard.family, "a", order_of(heard.family, "a")).family
    order = order_of(family, "a")
    late = exited(family, "a", order, "failed", "boom", stop, "2026-01-01T00:02:00+00:00")
    assert late.give_up is None
    heard = exited(family, "a", order, "failed", "boom", stop, "2026-01-01T00:00:59+00:00")
    assert heard.give_up is not None
    assert "more than 2 restarts" in heard.give_up
    assert heard.family.children == []


def test_a_temporary_child_and_one_that_stopped_are_not_restarted_by_a_group() -> None:
    """Its siblings go on."""
    family = family_of("a", "b", restart="temporary")
    heard = exited(family, "a", order_of(family, "a"), "failed", "", GROUP, AT)
    assert (heard.orders, statuses(heard.family)) == ((), {"b": "running"})
    family = family_of("a", "b")
    heard = exited(family, "a", order_of(family, "a"), "stopped", "", GROUP, AT)
    assert (heard.orders, statuses(heard.family)) == ((), {"b": "running"})


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["spawn", "stop", "start", "exit"]),
            st.sampled_from("abc"),
            st.integers(0, 3),
        ),
        max_size=40,
    ),
    st.sampled_from([GROUP, REST, Supervision()]),
)
def test_orders_of_a_tag_grow_and_nobody_is_started_twice(
    moves: list[tuple[str, str, int]], supervision: Supervision
) -> None:
    """Whatever is said, late or twice: a child is started again only after its end was heard."""
    family = FamilyRecord()
    alive: dict[str, int] = {}
    for verb, tag, ago in moves:
        order = max(0, (find(family, tag).order if find(family, tag) else 0) - ago)  # type: ignore[union-attr]
        if verb == "spawn":
            family, orders = spawned(
                family,
                tag,
                f"p_{tag}",
                run="m:C",
                restart="transient",
                digest="x",
                wish={},
                keep=supervision.is_group,
            )
        elif verb == "stop":
            family, orders = stopping(family, tag, "enough")
        elif verb == "start":
            heard = started(family, tag, order)
            family, orders = heard.family, list(heard.orders)
        else:
            heard = exited(family, tag, order, "failed", "boom", supervision, AT)
            if heard.is_news and alive.get(tag) == order:
                del alive[tag]
            family, orders = heard.family, list(heard.orders)
        for item in orders:
            if item.verb == "start":
                assert alive.get(item.tag) in (None, item.order), "started beside itself"
                alive[item.tag] = item.order


# ---- who has ended ------------------------------------------------------------------------


def wish_of(name: str, **more: object) -> Deployment:
    """The wish for one agent."""
    spec = {"run": "m:C", "restart": "transient", **more}
    return Deployment.model_validate({"name": name, "standalone": True, "spec": spec})


def child_of(parent: str, on_death: str = "stop", **more: object) -> Deployment:
    """The wish for a child called kid."""
    link = {"id": parent, "tag": "kid", "order": 1, "on_death": on_death}
    return wish_of("kid", parent=link, **more)


def held(wish: Deployment, status: str, reason: str = "", **more: object) -> Held:
    """Its record."""
    record = AgentRecord.model_validate(
        {
            "id": wish.name,
            "spec": wish.spec,
            "digest": "d",
            "status": status,
            "reason": reason,
            "epoch": 1,
            **more,
        }
    )
    return Held(record, 1)


def steps(desired: list[Deployment], *there: Held) -> list[object]:
    """What is decided about them."""
    wishes = {wish.name: wish for wish in desired}
    records = {item.record.id: item for item in there}
    return list(decide(wishes, records, lambda _: "d"))


@pytest.mark.parametrize(
    ("status", "reason", "restart", "ends"),
    [
        ("running", "", "transient", False),
        ("hibernated", "", "transient", False),
        ("unavailable", "", "transient", False),
        ("stopped", "done", "transient", True),
        ("stopped", "done", "permanent", False),
        ("failed", "boom", "transient", False),
        ("failed", "boom", "temporary", True),
        ("failed", "quarantined: boom", "permanent", True),
    ],
)
def test_what_is_an_end_for_good(status: str, reason: str, restart: str, ends: bool) -> None:
    """A failover, sleep and a restart are none."""
    parent, child = wish_of("p"), child_of("p", restart=restart)
    found = steps([parent, child], held(parent, "running"), held(child, status, reason))
    expected = "failed" if status == "failed" else "stopped"
    assert found == ([End("kid", Ending(status=expected, reason=reason))] if ends else [])


def test_the_end_of_a_child_is_told_once_its_record_is_gone() -> None:
    """Not before: it may still be doing something."""
    parent = wish_of("p")
    child = child_of("p").model_copy(update={"ending": Ending(reason="done")})
    assert steps([parent, child], held(parent, "running"), held(child, "running")) == []
    assert steps([parent, child], held(parent, "running")) == [Bury("kid", Ending(reason="done"))]
    assert kin_id("exited", "kid", "p", 1) != kin_id("exited", "kid", "p", 2)


@pytest.mark.parametrize("fate", ["stop", "continue", "emit_orphan"])
def test_the_end_of_a_parent_is_as_the_link_says(fate: str) -> None:
    """Whether it was deleted, or has stopped itself; its failover is no end."""
    parent, child = wish_of("p"), child_of("p", fate)
    kid = held(child, "running")
    assert steps([parent, child], held(parent, "unavailable"), kid) == []
    for desired, *there in (([child], kid), ([parent, child], held(parent, "stopped", "bye"), kid)):
        found = steps(desired, *there)
        kinds = {"stop": [End], "continue": [], "emit_orphan": [TellOrphan]}[fate]
        assert [type(step) for step in found] == kinds


def test_replicas_belong_to_their_deployment_as_long_as_it_wants_them() -> None:
    """By number."""
    replicas = Deployment(name="w", replicas=2, spec=AgentSpec(run="m:C"))
    assert owner_of("w-1", {"w": replicas}) is replicas
    assert owner_of("w-2", {"w": replicas}) is None
    assert owner_of("w", {"w": replicas}) is None


# ---- wishes on a real server --------------------------------------------------------------


async def test_a_newer_order_takes_the_place_of_a_wish_that_is_being_buried() -> None:
    """A parent gives it only after it has heard of the end; an older one is refused or fenced."""
    async with TestCluster(nodes=0) as nodes:
        bucket = Bucket(nodes.client.bus, nodes.client.subjects, "desired")

        async def ordered(order: int, may_write: bool = True) -> str | None:
            wish = child_of("p")
            link = ParentLink(id="p", tag="kid", order=order)
            spec = wish.spec.model_copy(update={"parent": link})
            fresh = wish.model_copy(update={"spec": spec})
            return await wish_child(bucket, fresh, may_write=lambda: may_write)

        assert await ordered(1) is None
        assert await ordered(1) is None
        with pytest.raises(FencedError):
            await ordered(2, may_write=False)
        assert await end_child(bucket, "p", "kid", 1, "enough", may_write=lambda: True)
        assert not await end_child(bucket, "p", "kid", 2, "enough", may_write=lambda: True)
        assert await ordered(1) is None
        assert await ordered(2) is None
        entry = await bucket.read("kid")
        assert entry is not None
        assert entry.value is not None
        stored = decode(Deployment, entry.value)
        assert stored.ending is None
        assert stored.spec.parent is not None
        assert stored.spec.parent.order == 2
        # The keeper, which still believes in the old wish, deletes on condition and fails.
        ended = stored.model_copy(update={"ending": Ending()})
        await bucket.replace("kid", encode(ended), expected=entry.revision)
        assert await ordered(0) == "kid is still ending as kid"


# ---- in a harness ---------------------------------------------------------------------------


class Kid(Agent):
    """Somebody's child."""


class Parent(Agent):
    """Has children, and remembers their ends."""

    class State(State):
        heard: str = ""

    @on("have")
    def have(self, signal: Signal[str]) -> str:
        id = self.ctx.spawn(Kid, tag=signal.data)
        if signal.data == "bad":
            raise RuntimeError("no child then")
        return id

    @on("drop")
    def drop(self, signal: Signal[str]) -> bool:
        return self.ctx.stop_child(signal.data)

    @on(ChildStarted)
    def begun(self, signal: Signal[ChildStarted]) -> None:
        self.state.heard += f"+{signal.data.tag}"

    @on(ChildExited)
    def ended(self, signal: Signal[ChildExited]) -> None:
        self.state.heard += f"-{signal.data.tag}:{signal.data.status}"


async def test_children_in_a_harness() -> None:
    """Had with the commit, kept through a crash, refused, started and ended as the test says."""
    async with AgentHarness(Parent, id="p") as agent:
        assert await agent.ask("have", "a") == child_id("p", "a") == "p_a"
        assert list(agent.children) == ["p_a"]
        with pytest.raises(Exception, match="no child then"):
            await agent.ask("have", "bad")
        await agent.crash()
        assert list(agent.children) == ["p_a"]
        await agent.child_started("a")
        await agent.child_started("a")
        await agent.child_exited("a", "failed", "boom")
        assert agent.state.heard == "+a-a:failed"
        agent.refuse_child("p_b", "somebody has it")
        await agent.ask("have", "b")
        assert agent.state.heard == "+a-a:failed-b:refused"
        assert not await agent.ask("drop", "nobody")
        await agent.ask("have", "c")
        assert await agent.ask("drop", "c")
        await agent.child_exited("c")
        assert agent.children == {}


def test_a_supervision_that_makes_no_sense_is_refused() -> None:
    """By name."""
    with pytest.raises(ConfigError, match="Supervision"):
        Supervision(strategy="all_for_none")
    with pytest.raises(ConfigError, match="on_exhausted"):
        Supervision(on_exhausted="panic")
    assert {str(ChildStatus.STARTING), str(AgentStatus.RUNNING)} == {"starting", "running"}
