"""Which suspect of a worker may start, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flask_bgjobs.job.records import JobSpec
from flask_bgjobs.worker import suspects
from flask_bgjobs.worker.suspects import Suspects
from tests.unit.helpers import make_spec


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(suspects, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def waiting(number: int) -> tuple[Suspects, list[JobSpec]]:
    """Suspects that wait."""
    specs = [make_spec(id=job_id, suspect=True) for job_id in range(number)]
    found = Suspects()
    for spec in specs:
        assert found.add(spec, is_exclusive=False, claimed=0.0)
    return found, specs


def start_all(found: Suspects, *, in_processes: bool = False) -> list[int]:
    """Start those whose turn it is; their ids."""
    started = []
    while spec := found.next(lambda _: True, lambda _: in_processes):
        found.remove(spec)
        found.note_start(spec, has_own_process=in_processes)
        started.append(spec.id)
    return started


def test_one_after_the_other(clock: Clock) -> None:
    """In threads the next suspect starts when the last one has run for half a second."""
    found, _ = waiting(3)
    assert start_all(found) == [0]
    clock.now += 0.4
    assert start_all(found) == []
    assert found.seconds_until_next() == pytest.approx(0.1)
    clock.now += 0.1
    assert start_all(found) == [1]
    clock.now += 0.5
    assert start_all(found) == [2]
    assert found.seconds_until_next() == float("inf")


def test_the_next_one_starts_when_the_last_one_ends(clock: Clock) -> None:
    """A suspect that has ended keeps no other waiting."""
    found, specs = waiting(2)
    assert start_all(found) == [0]
    found.note_end(specs[0].key)
    assert start_all(found) == [1]


def test_at_once_in_processes(clock: Clock) -> None:
    """A suspect that has a process of its own needs no proof."""
    found, _ = waiting(3)
    assert start_all(found, in_processes=True) == [0, 1, 2]


@pytest.mark.parametrize("in_processes", [False, True])
def test_an_exclusive_one_has_no_other_beside_it(clock: Clock, in_processes: bool) -> None:
    """While a suspect that was lost among several waits or runs, no other is taken."""
    found, _ = waiting(0)
    exclusive, other = (make_spec(id=job_id, suspect=True) for job_id in (1, 2))
    assert found.add(exclusive, is_exclusive=True, claimed=0.0)
    assert not found.add(other, is_exclusive=False, claimed=0.0)
    assert not found.may_claim
    assert start_all(found, in_processes=in_processes) == [1]
    clock.now += 60
    assert not found.add(other, is_exclusive=False, claimed=0.0)
    assert not found.add(other, is_exclusive=True, claimed=0.0)
    assert not found.may_claim
    assert found.note_end(exclusive.key)
    assert found.may_claim
    assert found.add(other, is_exclusive=True, claimed=0.0)


def test_an_exclusive_one_waits_for_no_other(clock: Clock) -> None:
    """It is for another worker; until those that are here have ended, none are claimed, or the same
    one would be claimed and given back again and again."""
    found, _ = waiting(2)
    assert found.may_claim
    assert not found.add(make_spec(id=7, suspect=True), is_exclusive=True, claimed=0.0)
    assert not found.may_claim
    assert found.add(make_spec(id=8, suspect=True), is_exclusive=False, claimed=0.0)
    assert not found.may_claim
    for job_id in (0, 1, 8):
        assert start_all(found) == [job_id]
        assert found.note_end(make_spec(id=job_id).key) == (job_id == 8)
    assert found.may_claim


def test_only_where_a_place_is_free(clock: Clock) -> None:
    """A suspect does not start where it would wait in its pool, and another may go first."""
    found, specs = waiting(2)
    assert found.next(lambda spec: spec.id == 1, lambda _: False) is specs[1]
    assert found.next(lambda _: False, lambda _: False) is None
    assert found.may_start_one(lambda queue: queue == "default")
    assert not found.may_start_one(lambda queue: queue == "mail")


def test_given_back(clock: Clock) -> None:
    """What waits can be taken back, and nothing of it is left."""
    found, _ = waiting(0)
    specs = [make_spec(id=1, suspect=True)]
    assert found.add(specs[0], is_exclusive=True, claimed=0.0)
    assert found.take_waiting() == specs
    assert found.may_claim
    assert len(found) == 0
    assert found.next(lambda _: True, lambda _: False) is None
