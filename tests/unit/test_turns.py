"""The order of claims: turns of keys and their weights."""

from __future__ import annotations

import collections
import random

import pytest

from flask_bgjobs.job.turns import (
    MAX_TURN,
    Standing,
    TurnsSeen,
    check_weight,
    claim_rank,
    fair_key_id,
    take_turn,
    weight_id,
)

HIGHEST, LOWEST = 2**31 - 1, -(2**31 - 1)


class Line:
    """A queue with one priority, which one worker serves."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.weights = weights or {}
        self.standing = Standing()
        self.following: dict[str, float] = {}
        self.pending: list[tuple[int, int, str]] = []
        self.running: int | None = None
        self.number = 0

    def add(self, key: str, jobs: int = 1) -> None:
        first = min(self.pending)[0] if self.pending else None
        was = self.standing.round
        self.standing = self.standing.at(TurnsSeen(self.running, first))
        if self.standing.round != was:
            self.following.clear()
        for _ in range(jobs):
            weight = self.weights.get(key, 1.0)
            turn, end = take_turn(self.standing, self.following.get(key), weight)
            self.following[key] = end
            self.number += 1
            self.pending.append((turn, self.number, key))
        self.standing = self.standing._replace(last=max(self.standing.last, end))

    def take(self, jobs: int = 1) -> str:
        taken = ""
        for _ in range(jobs):
            self.running, _, key = min(self.pending)
            self.pending.remove(min(self.pending))
            taken += key
        return taken


def test_turns_are_between_two_priorities() -> None:
    """The last turn of a priority comes before the next lower priority, and all ranks fit into 64
    bits."""
    ranks = [claim_rank(p, t) for p in (HIGHEST, 1, 0, -1, LOWEST) for t in (0, 1, MAX_TURN)]
    assert ranks == sorted(ranks)
    assert -(2**63) <= ranks[0] <= ranks[-1] < 2**63


def test_keys_take_turns() -> None:
    """A key with two jobs runs them beside the first ones of a key with many."""
    line = Line()
    line.add("a", 100)
    line.add("b", 2)
    assert line.take(8) == "ababaaaa"


def test_late_key_starts_at_the_current_turn() -> None:
    """A key that arrives late gets no turns for the time before."""
    line = Line()
    line.add("a", 100)
    line.take(50)
    line.add("b", 3)
    assert line.take(6) == "ababab"


def test_a_key_is_not_punished_for_work_that_is_done() -> None:
    """A key that has run a thousand jobs while nobody else had any does not have to wait for them
    now."""
    line = Line()
    for _ in range(1_000):
        line.add("a")
        line.take()
    line.add("b", 100)
    line.add("a", 3)
    assert line.take(6).count("a") == 3


def test_weights() -> None:
    """In each turn, a key runs as many jobs as its weight says."""
    line = Line({"a": 3.0, "c": 0.5})
    for key in "abc":
        line.add(key, 60)
    taken = collections.Counter(line.take(45))
    assert taken == {"a": 30, "b": 10, "c": 5}


@pytest.mark.parametrize("seed", range(20))
def test_no_key_gets_ahead(seed: int) -> None:
    """While two keys have jobs all the time, neither runs more than its share by more than a turn,
    whatever the others do."""
    choice = random.Random(seed)
    weights = {key: choice.choice([0.5, 1.0, 2.0, 3.0]) for key in "abcd"}
    line = Line(weights)
    line.add("a", 2_000)
    line.add("b", 2_000)
    taken: collections.Counter[str] = collections.Counter()
    for _ in range(200):
        if choice.random() < 0.3:
            line.add(choice.choice("cd"), choice.randrange(1, 30))
        taken.update(line.take(choice.randrange(1, 5)))
        shares = [taken[key] / weights[key] for key in "ab"]
        assert abs(shares[0] - shares[1]) <= 1 + 1 / weights["a"] + 1 / weights["b"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # If all jobs wait for a limit, a new key starts at the first of them, or at the last that
        # runs: the first may be one of a key that is paused.
        (TurnsSeen(waiting=40), Standing(70.0, 900.0, 5)),
        (TurnsSeen(waiting=80), Standing(80.0, 900.0, 5)),
        (TurnsSeen(running=90, waiting=80), Standing(90.0, 900.0, 5)),
        # A job that runs since an earlier round.
        (TurnsSeen(running=5_000, waiting=80), Standing(900.0, 900.0, 5)),
        (TurnsSeen(running=90, pending=80, waiting=3), Standing(80.0, 900.0, 5)),
        (TurnsSeen(running=90, pending=60), Standing(70.0, 900.0, 5)),
        # Without jobs, the turns begin anew, or where other queues are.
        (TurnsSeen(running=90), Standing(1.0, 1.0, 6)),
        (TurnsSeen(elsewhere=30), Standing(30.0, 30.0, 6)),
    ],
)
def test_current_turn(seen: TurnsSeen, expected: Standing) -> None:
    """The current turn follows the jobs that are about to run."""
    assert Standing(70.0, 900.0, 5).at(seen) == expected


def test_last_turn() -> None:
    """Jobs behind the last turn share it."""
    turn, end = take_turn(Standing(MAX_TURN - 0.5, 0.0), None, 1.0)
    assert (turn, end) == (MAX_TURN - 1, MAX_TURN + 0.5)
    assert take_turn(Standing(), end, 1.0) == (MAX_TURN, MAX_TURN + 1.5)


def test_ids_differ() -> None:
    """Ids of keys depend on the queue and the priority, those of weights only on the key."""
    ids = {fair_key_id(q, p, k) for q in "ab" for p in (1, 11) for k in ("", "1", "a")}
    assert len({*ids, weight_id("a"), weight_id("1")}) == 14


@pytest.mark.parametrize("weight", [0, -1, 0.009, 1_001, True, "3", None, float("nan")])
def test_wrong_weight(weight: object) -> None:
    """A weight that is not a number in the range is refused, with the range."""
    with pytest.raises(ValueError, match=r"a number from 0.01 to 1,000, not"):
        check_weight(weight)
