"""Commands about recurring jobs: ``schedules list``, ``show``, ``pause``, ``resume``, ``run``,
``override`` and ``reset``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

import click
from flask.cli import AppGroup

from ..flow.schedules.data import (
    SHOWN_RUNS,
    NextRun,
    ScheduleRow,
    Tick,
    detailed_data,
    next_runs,
    row_data,
    row_of,
)
from ..flow.schedules.manage import RecurringJob, Schedules, readable_schedules
from ..flow.schedules.recurrence import MISSED, OVERLAP
from ..job.text import one_line
from ..state import AppState, current_state, import_jobs
from .group import Duration, bgjobs_commands, json_option, one_sentence
from .output import print_json, print_table
from .user import this_user

_CLOCK = "%Y-%m-%d %H:%M:%S"
_name_argument = click.argument("name")


@bgjobs_commands.group("schedules", cls=AppGroup, invoke_without_command=True)
@json_option
@click.pass_context
def schedules_commands(context: click.Context, as_json: bool) -> None:
    """Show recurring jobs, and change them at run time; without a command: list."""
    if context.invoked_subcommand is None:
        context.invoke(list_command, as_json=as_json)


@schedules_commands.command("list")
@json_option
@one_sentence
def list_command(as_json: bool) -> None:
    """List the recurring jobs by name."""
    state = _state()
    schedules, unreadable = readable_schedules(state)
    for name in unreadable:
        click.echo(
            f"The row of the schedule {one_line(name)} cannot be read; a worker whose code has it "
            "writes it anew when it starts",
            err=True,
        )
    rows = _rows(state, schedules)
    if as_json:
        print_json([row_data(row) for row in rows])
    elif rows:
        print_table(
            ["NAME", "WHEN", "TIME ZONE", "NEXT RUN (UTC)", "LAST RUN (UTC)", "STATE"],
            [_cells(row) for row in rows],
        )
    else:
        click.echo(
            "No recurring jobs: decorate a function with @bgjobs.job(cron='0 3 * * *'), or name "
            "one in BGJOBS_SCHEDULE"
        )


@schedules_commands.command("show")
@_name_argument
@json_option
@one_sentence
def show_command(name: str, as_json: bool) -> None:
    """Show a recurring job: what it runs, its options, and its last and next runs."""
    state = _state()
    schedule = Schedules(state)[name]
    ticks = state.store.last_ticks([schedule.id], SHOWN_RUNS)[schedule.id]
    row = row_of(state, schedule, state.store.live_schedule_names(), ticks)
    last = [Tick.of(tick) for tick in ticks]
    runs = next_runs(schedule)
    if as_json:
        print_json(detailed_data(row, last, runs))
    else:
        _print_schedule(row, last, runs)


@schedules_commands.command("pause")
@_name_argument
@one_sentence
def pause_command(name: str) -> None:
    """Stop a recurring job until it is resumed; jobs already enqueued still run."""
    schedule = Schedules(_state())[name].pause(this_user())
    click.echo(f"Schedule {schedule.name} is paused")


@schedules_commands.command("resume")
@_name_argument
@one_sentence
def resume_command(name: str) -> None:
    """Continue a paused recurring job with its next run."""
    schedule = Schedules(_state())[name].resume(this_user())
    click.echo(f"Schedule {schedule.name} runs next at {_clock(schedule.next_tick_at)} UTC")


@schedules_commands.command("run")
@_name_argument
@json_option
@one_sentence
def run_command(name: str, as_json: bool) -> None:
    """Enqueue a recurring job now; its next runs stay as they are."""
    schedule = Schedules(_state())[name]
    job = schedule.run_now(this_user())
    if as_json:
        print_json({"job": job.id, "deduplicated": job.deduplicated})
    elif job.deduplicated:
        click.echo(f"Nothing enqueued: job {job.id} has the same unique_key")
    else:
        click.echo(f"Job {job.id} enqueued")


@schedules_commands.command("override")
@_name_argument
@click.option("--cron", help="A cron expression, such as '0 3 * * *'.")
@click.option("--every", type=Duration(), help="An interval, such as 30s or 2h.")
@click.option("--timezone", help="The time zone of --cron, such as Europe/Berlin.")
@click.option("--missed", type=click.Choice(MISSED), help="What to run for missed runs.")
@click.option("--grace", type=Duration(), help="Skip a run that is later than this.")
@click.option("--overlap", type=click.Choice(OVERLAP), help="What to do while the last job runs.")
@click.option("--jitter", type=Duration(), help="Delay each job at random by up to this.")
@one_sentence
def override_command(name: str, **options: Any) -> None:
    """Replace options of a recurring job until it is reset; acts on all workers."""
    values = {option: value for option, value in options.items() if value is not None}
    if not values:
        raise click.UsageError("give at least one option to override, such as --cron")
    state = _state()
    schedule = Schedules(state)[name].override(this_user(), **values)
    click.echo(f"Schedule {schedule.name}: {_drift(*_rows(state, [schedule]))}")


@schedules_commands.command("reset")
@_name_argument
@one_sentence
def reset_command(name: str) -> None:
    """Remove the override of a recurring job, so that it recurs as the code says."""
    schedule = Schedules(_state())[name].reset(this_user())
    click.echo(f"Schedule {schedule.name} recurs as in the code: {schedule.recurrence.expression}")


def _state() -> AppState:
    """The state of the app, whose modules with jobs are imported, as in a worker."""
    state = current_state()
    import_jobs(state)
    return state


def _rows(state: AppState, schedules: Sequence[RecurringJob]) -> list[ScheduleRow]:
    live = state.store.live_schedule_names()
    ticks = state.store.last_ticks([each.id for each in schedules if each.id], 1)
    return [row_of(state, each, live, ticks.get(each.id, ())) for each in schedules]


def _cells(row: ScheduleRow) -> tuple[object, ...]:
    last = None if row.last_tick is None else row.last_tick.tick_at
    return (
        row.name,
        f"{row.expression}{' (overridden)' if row.overridden else ''}",
        row.recurrence.timezone,
        _clock(row.next_run_at),
        _clock(last),
        row.state,
    )


def _print_schedule(row: ScheduleRow, ticks: Sequence[Tick], runs: Sequence[NextRun]) -> None:
    recurrence = row.recurrence
    words = "" if recurrence.cron is None else f"  ({row.words})"
    lines = {
        "name": row.name,
        "job": row.job_name,
        "parameters": row.parameters or "not readable",
        "queue": row.queue,
        "state": row.state,
        "when": f"{row.expression}{words}",
        "time zone": recurrence.timezone,
        "override": _drift(row),
        "missed": recurrence.missed,
        "grace": "" if recurrence.grace is None else f"{recurrence.grace:g} s",
        "overlap": recurrence.overlap,
        "jitter": f"up to {recurrence.jitter:g} s" if recurrence.jitter else "",
    }
    for name, text in lines.items():
        if text:
            click.echo(f"{name:>12}  {one_line(text)}")
    click.echo("\nLast runs (UTC)")
    for tick in ticks:
        note = tick.reason or (f"job {tick.job_id}" if tick.job_id else "")
        missed = f", {tick.missed:,} earlier ones missed" if tick.missed else ""
        click.echo(f"  {_clock(tick.tick_at)}  {tick.outcome}  {one_line(note)}{missed}")
    if not ticks:
        click.echo("  none")
    click.echo(f"\nNext runs ({recurrence.timezone}, UTC)")
    for run in runs:
        click.echo(f"  {run.local}   {_clock(run.at)}")


def _drift(row: ScheduleRow) -> str:
    """How a schedule differs from the code; empty if it is not overridden."""
    if not row.overridden:
        return ""
    changes = "; ".join(
        f"{each.label + ' ' if each.label else ''}{each.now}, in the code {each.code}"
        for each in row.differences
    )
    by = f" by {row.overridden_by}" if row.overridden_by else ""
    when = "" if row.overridden_at is None else f" at {_clock(row.overridden_at)} UTC"
    later = "; the code has changed since" if row.has_changed_since_override else ""
    return f"{changes} (overridden{by}{when}{later})"


def _clock(time: dt.datetime | None) -> str:
    return "" if time is None else time.strftime(_CLOCK)
