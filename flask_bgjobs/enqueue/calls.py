"""Calls: jobs that are not enqueued yet, with their parameters and options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import BgJobsError, InvalidJob
from ..job.text import shown
from ..models import Job
from ..options import JobOptions
from ..signals import job_refused
from ..state import AppState, current_state
from ..store import NewJobs
from .enqueue import AUTO, Parameters, SessionChoice, insert, new_jobs


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A job that is not enqueued yet. The ``call`` methods of ``BgJobs`` and of decorated
    functions return one."""

    target: str
    """Dotted name of the class or function."""
    method: str | None
    """The method of a class; ``None`` for a function."""
    parameters: Parameters
    """A list of positional or a dict of keyword parameters."""
    options: JobOptions
    """The options that differ from those of the decorator and of the configuration."""

    @property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    def enqueue(self, *, session: SessionChoice = AUTO) -> Job:
        """Enqueue the job, and return it.

        :param session: as in :func:`~flask_bgjobs.run_background_job`.
        :raises JobNotAllowed: when the allow-list does not hold target or method.
        :raises InvalidJob: when a parameter or option is not valid.
        """
        return enqueue_calls(current_state(), [self], session)[0]

    def __repr__(self) -> str:
        return f"<Call {self.name}>"


def enqueue_calls(
    state: AppState, calls: Sequence[Call], session: SessionChoice = AUTO
) -> list[Job]:
    """Enqueue a job for each call in one transaction, and return them in order.

    Successive calls of one function with equal options are inserted by one statement.

    :raises JobNotAllowed: when the allow-list does not hold a target or method.
    :raises InvalidJob: when one of the calls, or one of their parameters or options, is not valid;
        then no job is enqueued.
    :raises UniqueKeyTaken: with ``on_duplicate="raise"``, when another job holds a key. Roll back a
        transaction that the jobs have joined: it holds the jobs of earlier calls.
    """
    groups = _alike(calls)
    new = [_checked(state, [calls[number] for number in numbers]) for numbers in groups]
    if not new:
        return []
    jobs = insert(state, new, session)
    numbers = [number for group in groups for number in group]
    return [job for _, job in sorted(zip(numbers, jobs, strict=True), key=lambda pair: pair[0])]


def _alike(calls: Sequence[Call]) -> list[list[int]]:
    """The numbers of the calls, grouped by name and options."""
    groups: list[list[int]] = []
    last: dict[tuple[str, str | None], list[int]] = {}
    for number, call in enumerate(calls):
        if not isinstance(call, Call):
            raise InvalidJob(f"a call is the result of job.call(…), not {shown(call)}")
        group = last.get((call.target, call.method))
        # Each job with a key of its own needs a statement of its own.
        if group is None or call.options.unique_key or calls[group[0]].options != call.options:
            groups.append(group := [])
            last[call.target, call.method] = group
        group.append(number)
    return groups


def _checked(state: AppState, calls: Sequence[Call]) -> NewJobs:
    """The jobs of calls with the same name and options."""
    first = calls[0]
    try:
        parameters = [call.parameters for call in calls]
        return new_jobs(state, first.target, first.method, parameters, first.options)
    except BgJobsError as error:
        state.emit(job_refused, target=first.target, method=first.method, error=error)
        raise
