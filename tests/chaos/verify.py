"""The verification: compares the evidence with every promise."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Sequence

from flask_bgjobs import Job
from flask_bgjobs.job.statuses import FINAL, JobStatus

from .evidence import CRASHED, LOST, Evidence
from .journal import END, Run
from .limits import exceeded, without_turn

_FINAL = frozenset(status.value for status in FINAL)
_NEXT = {
    None: {"scheduled", "pending"},
    "scheduled": {"pending", "cancelled"},
    "retrying": {"pending", "cancelled"},
    "pending": {"running", "cancelled"},
    "running": {"completed", "failed", "cancelled", "retrying", "scheduled", "pending"},
}
"""The allowed transitions. No job is retried by hand here, so a final status never changes."""
_NEXT_WITH_LIMITS = {
    None: {"scheduled", "waiting"},
    "scheduled": {"waiting", "cancelled"},
    "retrying": {"waiting", "cancelled"},
    "waiting": {"pending", "waiting", "cancelled"},
    "pending": {"running", "waiting", "cancelled"},
    "running": {*_NEXT["running"], "waiting"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    promise: str
    """One of :data:`PROMISES`."""
    job_id: int | None
    sentence: str


Found = Iterator[tuple[int | None, str]]


def verify(evidence: Evidence) -> list[Violation]:
    """Every broken promise; empty if all were kept."""
    return [
        Violation(promise, job_id, sentence)
        for promise, checks in PROMISES.items()
        for check in checks
        for job_id, sentence in check(evidence)
    ]


def _missing(evidence: Evidence) -> Found:
    rows_by_token = evidence.by_token()
    for planned in evidence.planned.values():
        if planned.result == "enqueued" and not rows_by_token.get(planned.token):
            yield planned.job_id, f"token {planned.token} was enqueued but has no row"


def _never_started(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        if job.status != JobStatus.CANCELLED and not evidence.starts.get(job.id):
            yield job.id, f"it is {job.status}, but its code never started"


def _stuck(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        if job.status not in _FINAL:
            yield job.id, f"it is still {job.status}"


def _wrong_transition(evidence: Evidence) -> Found:
    for job_id, changes in evidence.history.items():
        job = evidence.jobs.get(job_id)
        has_limits = job is not None and job.limits_json is not None
        allowed = _NEXT_WITH_LIMITS if has_limits else _NEXT
        for change in changes:
            if change.status not in allowed.get(change.old_status, ()):
                yield job_id, f"this transition is not allowed: {change}"


def _wrong_attempt(evidence: Evidence) -> Found:
    for job_id, changes in evidence.history.items():
        for change in changes:
            claimed = change.status == "running"
            if change.attempt != (change.old_attempt or 0) + claimed:
                yield job_id, f"the attempt was {change.old_attempt}: {change}"


def _settled_twice(evidence: Evidence) -> Found:
    for job_id, changes in evidence.history.items():
        settled = collections.Counter(c.attempt for c in changes if c.old_status == "running")
        for attempt, times in settled.items():
            if times > 1:
                yield job_id, f"attempt {attempt} was settled {times} times"


def _row_differs(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        last = evidence.history[job.id][-1]
        if (last.status, last.attempt) != (job.status, job.attempt):
            yield (
                job.id,
                f"its row says {job.status}, attempt {job.attempt}; last change: {last}",
            )


def _quarantined(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        innocent = not evidence.planned_of(job).is_poison
        if innocent and job.status == JobStatus.FAILED and job.error_type == "Crashed":
            yield job.id, f"it was quarantined: {job.error}"


def _blamed_without_proof(evidence: Evidence) -> Found:
    for job_id, failures in evidence.failures.items():
        outcomes = {attempt: outcome for attempt, outcome, _ in failures}
        released = {
            change.attempt
            for change in evidence.history[job_id]
            if change.old_status == "running" and change.status in ("pending", "waiting")
        } - outcomes.keys()
        for attempt, outcome, error in failures:
            with_its_worker = outcome == CRASHED and "only suspect" in error
            # A suspect that is released stays a suspect.
            before = next(n for n in range(attempt - 1, -1, -1) if n not in released)
            if with_its_worker and outcomes.get(before) not in (*LOST, CRASHED):
                yield job_id, f"it was blamed in attempt {attempt} but was not a suspect: {error}"


def _wrong_outcome(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        planned = evidence.planned_of(job)
        kind = planned.kind
        if job.status == JobStatus.CANCELLED and planned.cancel_asked:
            continue
        if job.status in _FINAL and job.status != kind.status:
            yield job.id, f"{kind.name}: it is {job.status}, expected {kind.status}: {job.error}"
        elif job.status in _FINAL and job.retry_count != kind.retries_used:
            yield job.id, f"{kind.name}: {job.retry_count} retries, expected {kind.retries_used}"


def _too_many_retries(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        if any(change.retry_count > job.retries for change in evidence.history[job.id]):
            yield job.id, f"it used more than its {job.retries} retries"


def _continued_after_cancel(evidence: Evidence) -> Found:
    for job_id, changes in evidence.history.items():
        for change in changes:
            if change.cancel_requested and change.status not in ("completed", "cancelled"):
                yield job_id, f"a cancel was requested before this change: {change}"


def _completed_without_end(evidence: Evidence) -> Found:
    for job in _completed(evidence):
        runs = evidence.runs.get((job.id, job.attempt), [])
        if not any(run.ended == END for run in runs):
            yield job.id, f"it completed, but its attempt {job.attempt} did not reach the end"


def _wrong_result(evidence: Evidence) -> Found:
    for job in _completed(evidence):
        made_by = job.result[0] if isinstance(job.result, list) else job.result
        if made_by != job.attempt:
            yield (
                job.id,
                f"attempt {job.attempt} completed it, but the result is of attempt {made_by}",
            )


def _completed(evidence: Evidence) -> list[Job]:
    return [job for job in evidence.jobs.values() if job.status == JobStatus.COMPLETED]


def _should_not_exist(evidence: Evidence) -> Found:
    ran = {run.start.token for run in _all_runs(evidence)}
    rows_by_token = evidence.by_token()
    for planned in evidence.planned.values():
        rows = rows_by_token.get(planned.token, [])
        if planned.result in ("rolled back", "deduplicated"):
            if rows or planned.token in ran:
                yield planned.job_id, f"token {planned.token} was {planned.result} but exists"
        elif len(rows) > 1:
            yield rows[0].id, f"token {planned.token} exists {len(rows)} times"
        elif not rows and planned.token in ran:
            yield planned.job_id, f"token {planned.token} ran but has no row"


def _partly_committed(evidence: Evidence) -> Found:
    rows_by_token = evidence.by_token()
    for planned in evidence.planned.values():
        if planned.how == "saved at once" or planned.result == "deduplicated":
            continue
        # An enqueue that raised may have found that its unique key was in use.
        may_be_deduplicated = planned.result == "in doubt" and "unique_key" in planned.options
        has_job, has_order = planned.token in rows_by_token, planned.token in evidence.orders
        if has_job != has_order and not (has_order and may_be_deduplicated):
            which = "job without the host's row" if has_job else "host's row without the job"
            yield planned.job_id, f"token {planned.token}: the {which} was committed"


def _ran_unclaimed(evidence: Evidence) -> Found:
    claims = {
        (job_id, change.attempt)
        for job_id, changes in evidence.history.items()
        for change in changes
        if change.status == "running"
    }
    for job_id, attempt in evidence.runs.keys() - claims:
        yield job_id, f"attempt {attempt} ran but was never claimed"


def _ran_twice(evidence: Evidence) -> Found:
    for (job_id, attempt), runs in evidence.runs.items():
        if len(runs) > 1:
            yield job_id, f"attempt {attempt} ran {len(runs)} times"


def _too_early(evidence: Evidence) -> Found:
    """Find jobs that started before they were due. The delay counts from the time of the enqueue,
    which on MySQL is read just before the insert."""
    for job in evidence.jobs.values():
        starts = evidence.starts.get(job.id)
        if not starts:
            continue
        delay = evidence.planned_of(job).options.get("delay", 0.0)
        due = job.created_at.replace(tzinfo=dt.UTC).timestamp() + delay
        early = due - (starts[0].at + evidence.clock_offset)
        if early > evidence.clock_slack:
            yield job.id, f"it started {early:.3f} s before it was due"


def _limit_exceeded(evidence: Evidence) -> Found:
    limits = {job.id: job.limits_json for job in evidence.jobs.values()}
    yield from exceeded(limits, evidence.runs, evidence.history, evidence.clock_offset)


def _ran_without_turn(evidence: Evidence) -> Found:
    yield from without_turn(evidence.jobs.values())


def _keeps_its_seat(evidence: Evidence) -> Found:
    for job_id in evidence.seats:
        yield job_id, "it has ended but still has a seat at a limit"


def _keeps_its_key(evidence: Evidence) -> Found:
    for job in evidence.jobs.values():
        if job.status in _FINAL and job.unique_hash is not None:
            yield job.id, f"it is {job.status} but still holds its unique_key"


def _all_runs(evidence: Evidence) -> Iterator[Run]:
    for runs in evidence.runs.values():
        yield from runs


PROMISES: dict[str, Sequence[Callable[[Evidence], Found]]] = {
    "lost": (_missing, _never_started),
    "with two outcomes": (_wrong_transition, _wrong_attempt, _settled_twice, _row_differs),
    "stuck": (_stuck,),
    "wrongly quarantined": (_quarantined, _blamed_without_proof),
    "with a wrong outcome": (
        _wrong_outcome,
        _too_many_retries,
        _continued_after_cancel,
        _keeps_its_key,
    ),
    "with a wrong result": (_completed_without_end, _wrong_result),
    "saved despite a rollback": (_should_not_exist, _partly_committed),
    "run when not allowed": (_ran_unclaimed, _ran_twice, _too_early, _ran_without_turn),
    "beyond a limit": (_limit_exceeded, _keeps_its_seat),
}
"""The violations that no job may show, and the checks that find them."""
