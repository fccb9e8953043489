"""Commands about recurring jobs: ``schedules list``, ``show``, ``pause``, ``resume``, ``run``,
``override`` and ``reset``."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections.abc import Mapping
from typing import Any

import click
from flask.cli import AppGroup

from ..flow.schedules.data import (
    SHOWN_TICKS,
    detail_data,
    drift_in_words,
    schedule_data,
    state_in_words,
)
from ..flow.schedules.describe import in_words
from ..flow.schedules.manage import RecurringJob, Schedules
from ..flow.schedules.recurrence import MISSED, OVERLAP
from ..job import serialize
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
    live = state.store.live_schedule_names()
    schedules = Schedules(state).all()
    if as_json:
        print_json([schedule_data(state, each, live) for each in schedules])
    elif schedules:
        print_table(
            ["NAME", "WHEN", "TIME ZONE", "NEXT RUN (UTC)", "LAST RUN (UTC)", "STATE"],
            [_cells(each, live) for each in schedules],
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
    live = state.store.live_schedule_names()
    ticks = state.store.last_ticks([schedule.id], SHOWN_TICKS)[schedule.id]
    data = detail_data(state, schedule, live, ticks)
    if as_json:
        print_json(data)
    else:
        _print_schedule(schedule, data)


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
    schedule = Schedules(_state())[name].override(this_user(), **values)
    click.echo(f"Schedule {schedule.name}: {drift_in_words(schedule)}")


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


def _cells(schedule: RecurringJob, live: set[str]) -> tuple[object, ...]:
    note = " (overridden)" if schedule.overrides else ""
    return (
        schedule.name,
        f"{schedule.recurrence.expression}{note}",
        schedule.recurrence.timezone,
        _clock(schedule.next_tick_at),
        _clock(schedule.last_tick_at),
        state_in_words(schedule, live),
    )


def _print_schedule(schedule: RecurringJob, data: Mapping[str, Any]) -> None:
    recurrence = schedule.recurrence
    lines = {
        "name": schedule.name,
        "job": schedule.job_name,
        "parameters": serialize.dumps_plain(data["parameters"]),
        "queue": schedule.queue,
        "state": data["state"],
        "when": f"{recurrence.expression}  ({in_words(recurrence)})",
        "time zone": recurrence.timezone,
        "override": drift_in_words(schedule),
        "missed": recurrence.missed,
        "grace": "" if recurrence.grace is None else f"{recurrence.grace:g} s",
        "overlap": recurrence.overlap,
        "jitter": f"up to {recurrence.jitter:g} s" if recurrence.jitter else "",
    }
    for name, text in lines.items():
        if text:
            click.echo(f"{name:>12}  {one_line(text)}")
    click.echo("\nLast runs (UTC)")
    for tick in data["last_ticks"]:
        note = tick["reason"] or (f"job {tick['job_id']}" if tick["job_id"] else "")
        missed = f", {tick['missed']:,} earlier ones missed" if tick["missed"] else ""
        click.echo(f"  {tick['tick_at']}  {tick['outcome']}  {one_line(note)}{missed}")
    if not data["last_ticks"]:
        click.echo("  none")
    click.echo(f"\nNext runs ({recurrence.timezone}, UTC)")
    zone = zoneinfo.ZoneInfo(recurrence.timezone)
    for following in schedule.next_ticks(SHOWN_TICKS):
        local = following.astimezone(zone)
        click.echo(f"  {local:%a} {local.strftime(_CLOCK)} {local:%Z}   {_clock(following)}")


def _clock(time: dt.datetime | None) -> str:
    return "" if time is None else time.strftime(_CLOCK)
