"""Jobs chosen by ids or by a selection, for ``retry``, ``cancel`` and ``delete``."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..job.records import MAX_ID
from ..job.statuses import CAN_CHANGE, JobStatus
from ..operations import actions
from ..state import AppState, current_state
from ..store import DONE, ActionResult, Selection
from .group import Moment, yes_option
from .output import counted, progress_bar
from .user import this_user

_NEITHER_OR_BOTH = (
    "give either the ids of jobs, or a selection with --status, --queue, --target, --error, "
    "--since and --until"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Verb:
    """The action of a command, and the words that describe it."""

    name: str
    act: actions.Act
    question: str
    asks_for_ids: bool = False
    """Whether it asks for confirmation even if the jobs are given by ids."""

    @property
    def statuses(self) -> tuple[JobStatus, ...]:
        """The statuses of the jobs that it can change, in the order in which they are read."""
        return CAN_CHANGE[self.name]

    @property
    def done(self) -> str:
        """The result for one job, such as ``cancelled``."""
        return DONE[self.name]


def chosen_jobs(verb: Verb) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds the argument for ids and the options for a selection to a command."""
    statuses = click.Choice([status.value for status in verb.statuses])
    parameters = (
        click.argument("ids", nargs=-1, type=click.IntRange(1, MAX_ID)),
        click.option("--status", "statuses", type=statuses, multiple=True, help="Repeatable."),
        click.option("--queue", "queues", multiple=True, help="Name of a queue; repeatable."),
        click.option("--target", help="Name of a function, a class, or a method with its class."),
        click.option("--error", help="Exception class of the last attempt, such as ValueError."),
        click.option(
            "--since",
            type=Moment(),
            help="Start: a duration before now, such as 2h, or an ISO 8601 time.",
        ),
        click.option(
            "--until",
            type=Moment(),
            help="End: a duration before now, such as 2h, or an ISO 8601 time.",
        ),
        yes_option,
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for add in reversed(parameters):
            command = add(command)
        return command

    return decorate


def act_on_chosen(verb: Verb, ids: Sequence[int], yes: bool, **selectors: Any) -> None:
    """Apply the action to the chosen jobs, and print the results."""
    is_selecting = any(value not in (None, ()) for value in selectors.values())
    if is_selecting == bool(ids):
        raise click.UsageError(_NEITHER_OR_BOTH)
    if ids:
        _act_on_ids(verb, ids, yes)
    else:
        state = current_state()
        _act_on_selection(state, verb, _selection(state, verb, **selectors), yes)


def _selection(
    state: AppState,
    verb: Verb,
    *,
    statuses: Sequence[str],
    queues: Sequence[str],
    target: str | None,
    error: str | None,
    since: dt.datetime | dt.timedelta | None,
    until: dt.datetime | dt.timedelta | None,
) -> Selection:
    now = state.store.clock()

    def moment(value: dt.datetime | dt.timedelta) -> dt.datetime:
        return now - value if isinstance(value, dt.timedelta) else value

    return Selection(
        statuses=tuple(s for s in verb.statuses if s in statuses or not statuses),
        until=now if until is None else min(moment(until), now),
        since=None if since is None else moment(since),
        queues=tuple(queues),
        target=target,
        error=error,
    )


def _act_on_ids(verb: Verb, ids: Sequence[int], yes: bool) -> None:
    if verb.asks_for_ids and not yes:
        click.confirm(verb.question.format(counted(len(ids), "job")), abort=True)
    result = verb.act(current_state(), ids, this_user())
    for job_id in result.done:
        click.echo(f"Job {job_id} {verb.done}")
    for job_id in result.requested:
        click.echo(f"Job {job_id} is running and was asked to stop")
    for job_id, reason in result.skipped.items():
        click.echo(f"Job {job_id} skipped: {reason}", err=True)
    if not result.done and not result.requested:
        sys.exit(1)


def _act_on_selection(state: AppState, verb: Verb, selection: Selection, yes: bool) -> None:
    count = state.store.count_selected(selection)
    if not count:
        click.echo("No jobs match")
        return
    if not yes:
        click.confirm(verb.question.format(counted(count, "job")), abort=True)
    done = requested = 0
    skipped: collections.Counter[str] = collections.Counter()
    with progress_bar(count, "Jobs") as advance:
        for result in actions.act_on_selected(
            state, verb.act, selection, this_user(selection.in_words())
        ):
            done += len(result.done)
            requested += len(result.requested)
            skipped.update(result.skipped.values())
            advance(_size(result))
    click.echo(_summary(verb, done, requested, skipped.total()))
    for reason, number in skipped.items():
        click.echo(f"{counted(number, 'job')} skipped: {reason}", err=True)
    if not done and not requested:
        sys.exit(1)


def _size(result: ActionResult) -> int:
    return len(result.done) + len(result.requested) + len(result.skipped)


def _summary(verb: Verb, done: int, requested: int, skipped: int) -> str:
    parts = [f"{counted(done, 'job')} {verb.done}"]
    if requested:
        parts.append(f"{requested:,} asked to stop")
    if skipped:
        parts.append(f"{skipped:,} skipped")
    return ", ".join(parts)
