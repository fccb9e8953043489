"""When a worker may start a suspect, a job that may have killed its worker."""

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


def make_waiting_suspects(number: int) -> tuple[Suspects, list[JobSpec]]:
    """Suspects that wait, and their jobs."""
    specs = [make_spec(id=job_id, suspect=True) for job_id in range(number)]
    waiting = Suspects()
    for spec in specs:
        assert waiting.add(spec, is_exclusive=False, claimed=0.0)
    return waiting, specs


def start_all(waiting: Suspects, *, in_processes: bool = False) -> list[int]:
    """Start all suspects that may start now, and return their ids."""
    started = []
    while spec := waiting.next(lambda _: True, lambda _: in_processes):
        waiting.remove(spec)
        waiting.note_start(spec, has_own_process=in_processes)
        started.append(spec.id)
    return started


def test_suspects_start_one_by_one(clock: Clock) -> None:
    """In threads, the next suspect starts when the previous one has run for 0.5 s."""
    waiting, _ = make_waiting_suspects(3)
    assert start_all(waiting) == [0]
    clock.now += 0.4
    assert start_all(waiting) == []
    assert waiting.seconds_until_next() == pytest.approx(0.1)
    clock.now += 0.1
    assert start_all(waiting) == [1]
    clock.now += 0.5
    assert start_all(waiting) == [2]
    assert waiting.seconds_until_next() == float("inf")


def test_next_suspect_starts_after_end(clock: Clock) -> None:
    """When a suspect has ended, the next one starts."""
    waiting, specs = make_waiting_suspects(2)
    assert start_all(waiting) == [0]
    waiting.note_end(specs[0].key)
    assert start_all(waiting) == [1]


def test_suspects_in_processes_start_at_once(clock: Clock) -> None:
    """Suspects with a process of their own start at once."""
    waiting, _ = make_waiting_suspects(3)
    assert start_all(waiting, in_processes=True) == [0, 1, 2]


@pytest.mark.parametrize("in_processes", [False, True])
def test_exclusive_suspect_runs_alone(clock: Clock, in_processes: bool) -> None:
    """While an exclusive suspect waits or runs, the worker accepts no other suspect.

    A suspect is exclusive if it was lost together with others.
    """
    waiting, _ = make_waiting_suspects(0)
    exclusive, other = (make_spec(id=job_id, suspect=True) for job_id in (1, 2))
    assert waiting.add(exclusive, is_exclusive=True, claimed=0.0)
    assert not waiting.add(other, is_exclusive=False, claimed=0.0)
    assert not waiting.may_claim
    assert start_all(waiting, in_processes=in_processes) == [1]
    clock.now += 60
    assert not waiting.add(other, is_exclusive=False, claimed=0.0)
    assert not waiting.add(other, is_exclusive=True, claimed=0.0)
    assert not waiting.may_claim
    assert waiting.note_end(exclusive.key)
    assert waiting.may_claim
    assert waiting.add(other, is_exclusive=True, claimed=0.0)


def test_exclusive_suspect_is_rejected_beside_others(clock: Clock) -> None:
    """An exclusive suspect is left to another worker if this one has suspects.

    Until they have ended, the worker claims no suspects; otherwise it would claim the same one and
    give it back again and again.
    """
    waiting, _ = make_waiting_suspects(2)
    assert waiting.may_claim
    assert not waiting.add(make_spec(id=7, suspect=True), is_exclusive=True, claimed=0.0)
    assert not waiting.may_claim
    assert waiting.add(make_spec(id=8, suspect=True), is_exclusive=False, claimed=0.0)
    assert not waiting.may_claim
    for job_id in (0, 1, 8):
        assert start_all(waiting) == [job_id]
        assert waiting.note_end(make_spec(id=job_id).key) == (job_id == 8)
    assert waiting.may_claim


def test_suspect_needs_free_place_in_pool(clock: Clock) -> None:
    """A suspect starts only if its pool has a free place; another suspect may start first."""
    waiting, specs = make_waiting_suspects(2)
    assert waiting.next(lambda spec: spec.id == 1, lambda _: False) is specs[1]
    assert waiting.next(lambda _: False, lambda _: False) is None
    assert waiting.may_start_one(lambda queue: queue == "default")
    assert not waiting.may_start_one(lambda queue: queue == "mail")


def test_take_waiting_removes_all(clock: Clock) -> None:
    """``take_waiting`` returns the waiting suspects and removes them."""
    waiting, _ = make_waiting_suspects(0)
    specs = [make_spec(id=1, suspect=True)]
    assert waiting.add(specs[0], is_exclusive=True, claimed=0.0)
    assert waiting.take_waiting() == specs
    assert waiting.may_claim
    assert len(waiting) == 0
    assert waiting.next(lambda _: True, lambda _: False) is None
