"""Judges of histories: pure functions from what was seen to what is wrong with it.

Each returns a `Judgement`: the violations it found, how much it looked at, and
whether it looked at everything. None decides on incomplete knowledge in the
system's favour: what it could not decide it says.
"""

from foundation_nats.chaos.checkers.answers import check_answers
from foundation_nats.chaos.checkers.capacity import check_capacity
from foundation_nats.chaos.checkers.drift import Allowance, Gain, Series, check_drift, worst_gains
from foundation_nats.chaos.checkers.effects import check_effects, check_order
from foundation_nats.chaos.checkers.exclusion import check_exclusion, check_fencing
from foundation_nats.chaos.checkers.exits import ExitSeen, check_exits, count_exits, explain
from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.checkers.leadership import check_false_downs, check_leadership
from foundation_nats.chaos.checkers.linearizable import check_linearizable
from foundation_nats.chaos.checkers.money import check_conserved, check_cut
from foundation_nats.chaos.checkers.records import check_assignments, check_records
from foundation_nats.chaos.checkers.reservations import check_ledgers, check_reservations
from foundation_nats.chaos.checkers.tallies import Tally, check_tallies

__all__ = [
    "Allowance",
    "ExitSeen",
    "Gain",
    "Judgement",
    "Series",
    "Tally",
    "check_answers",
    "check_assignments",
    "check_capacity",
    "check_conserved",
    "check_cut",
    "check_drift",
    "check_effects",
    "check_exclusion",
    "check_exits",
    "check_false_downs",
    "check_fencing",
    "check_leadership",
    "check_ledgers",
    "check_linearizable",
    "check_order",
    "check_records",
    "check_reservations",
    "check_tallies",
    "count_exits",
    "explain",
    "worst_gains",
]
