"""Who is told of a dead letter, and how often a signal is tried by its own word."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from foundation_nats.bus.subjects import Subjects
from foundation_nats.signaling.burial import attempts_of, words
from foundation_schemas import DeadLetter

SUBJECTS = Subjects("c")


def told(code: str = "agent.handler", **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Subject and envelope of each word."""
    letter = DeadLetter(agent="b", code=code, reason="why", attempts=2, at="now")
    signal = {"id": "1", "type": "job", "source": "agent:a", "subject": "agent:b", **body}
    found = words(SUBJECTS, signal, letter, source="agent:b", seed="s")
    again = words(SUBJECTS, signal, letter, source="agent:b", seed="s")
    assert [word.msg_id for word in again] == [word.msg_id for word in found]
    return [(word.subject.rpartition(".")[2], orjson.loads(word.payload)) for word in found]


def test_who_asks_for_it_is_told() -> None:
    """A box by an answer, an agent by a signal of the type that it named."""
    ((box, answer),) = told(replyto="~vote-1")
    assert (box, answer["data"]["error"]["code"]) == ("~vote-1", "agent.handler")
    assert answer["data"]["cause"] == "1"
    ((agent, signal),) = told(onerror="job.failed", data={"n": 1}, traceparent="00-" + "1" * 52)
    assert (agent, signal["type"], signal["cause"]) == ("a", "job.failed", "1")
    assert signal["data"]["data"] == {"n": 1}
    assert signal["traceparent"].startswith("00-" + "1" * 32)
    assert [name for name, _ in told(replyto="~sent-1", onerror="x")] == ["~sent-1", "a"]


def test_of_a_passed_deadline_only_those_who_wait() -> None:
    """Patterns set their deadlines themselves."""
    assert told("expired", replyto="~vote-1") == []
    assert [name for name, _ in told("expired", replyto="~sent-1")] == ["~sent-1"]
    assert [name for name, _ in told("expired", onerror="late")] == ["a"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"replyto": "a"},
        {"replyto": "~a.b"},
        {"replyto": 7},
        {"onerror": ""},
        {"onerror": 7},
        {"onerror": "x" * 300},
        {"onerror": "x", "source": "client:a"},
        {"onerror": "x", "source": "agent:a.>"},
        {"onerror": "x", "id": 7},
    ],
)
def test_what_is_no_address_is_not_written_to(body: dict[str, Any]) -> None:
    """Anybody may publish a signal: what it asks for is not trusted."""
    assert told(**body) == []


def test_what_is_too_large_is_not_sent_back() -> None:
    """The news come all the same."""
    ((_, signal),) = told(onerror="x", data="y" * 300_000)
    assert signal["data"].get("data") is None


def test_attempts_by_its_own_word() -> None:
    """Within limits; nonsense counts as nothing."""
    assert [attempts_of(body, 5) for body in ({"attempts": 2}, {"attempts": 1000}, {}, None)] == [
        2,
        100,
        5,
        5,
    ]
    assert [attempts_of({"attempts": said}, 5) for said in (0, -1, "3", True, 2.5, None)] == [5] * 6
