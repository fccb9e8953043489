"""Commands about limits: ``limits list``, ``show``, ``override``, ``reset``, ``pause`` and
``resume``."""

from __future__ import annotations

from typing import Any

import click
from flask.cli import AppGroup

from ..flow.limits.data import drift, key_data, limit_data, state_of_limit
from ..flow.limits.manage import Limits, LimitState, list_limits
from ..job.text import one_line
from ..state import AppState, current_state, import_jobs
from ..store import MAX_COUNTED, KeyRow
from .group import Duration, bgjobs_commands, json_option, one_sentence
from .output import print_json, print_table
from .user import this_user

_SHOWN_KEYS = 100
_name_argument = click.argument("name")
_key_option = click.option("--key", help="Only jobs with this key.")


@bgjobs_commands.group("limits", cls=AppGroup, invoke_without_command=True)
@json_option
@click.pass_context
def limits_commands(context: click.Context, as_json: bool) -> None:
    """Show limits, and change them at run time; without a command: list."""
    if context.invoked_subcommand is None:
        context.invoke(list_command, as_json=as_json)


@limits_commands.command("list")
@json_option
@one_sentence
def list_command(as_json: bool) -> None:
    """List the limits by name."""
    limits = list_limits(_state())
    if as_json:
        print_json([limit_data(limit) for limit in limits])
    elif limits:
        print_table(
            ["NAME", "ALLOWS", "STATE"],
            [(one_line(each.name), each.rule.in_words(), state_of_limit(each)) for each in limits],
        )
    else:
        click.echo(
            "No limits: give one to a job with @bgjobs.job(limits=Limit(concurrency=1)), or name "
            "one in BGJOBS_LIMITS"
        )


@limits_commands.command("show")
@_name_argument
@_key_option
@json_option
@one_sentence
def show_command(name: str, key: str | None, as_json: bool) -> None:
    """Show a limit, and its keys at which jobs wait, that are paused, or that jobs use."""
    limit = Limits(_state())[name]
    keys = limit.busy_keys(_SHOWN_KEYS, key=key)
    if as_json:
        print_json({**limit_data(limit), "keys": [key_data(limit, each) for each in keys]})
        return
    lines = {
        "name": limit.name,
        "allows": limit.rule.in_words(),
        "override": drift(limit),
        "state": _paused(limit),
    }
    for label, text in lines.items():
        if text:
            click.echo(f"{label:>8}  {one_line(text)}")
    click.echo()
    if keys:
        print_table(
            ["KEY", "SEATS TAKEN", "WAITING", "RATE LEFT", "NEXT START", "STATE"],
            [_cells(limit, each) for each in keys],
        )
    else:
        click.echo("No job uses it now")


@limits_commands.command("override")
@_name_argument
@click.option("--concurrency", type=int, help="How many jobs may run at once.")
@click.option("--rate", type=int, help="How many jobs may start in the time of --per.")
@click.option("--per", type=Duration(), help="The period of --rate, such as 60s or 1h.")
@click.option("--burst", type=int, help="How many jobs may start at once after a pause.")
@one_sentence
def override_command(name: str, **options: Any) -> None:
    """Replace numbers of a limit until it is reset; acts on all workers."""
    values = {option: value for option, value in options.items() if value is not None}
    if not values:
        raise click.UsageError("give at least one number to override, such as --rate")
    limit = Limits(_state())[name].override(this_user(), **values)
    click.echo(f"Limit {one_line(limit.name)}: {one_line(drift(limit))}")


@limits_commands.command("reset")
@_name_argument
@one_sentence
def reset_command(name: str) -> None:
    """Remove the override of a limit, so that the numbers in the code apply."""
    limit = Limits(_state())[name].reset(this_user())
    click.echo(f"Limit {one_line(limit.name)} is as in the code: {limit.rule.in_words()}")


@limits_commands.command("pause")
@_name_argument
@_key_option
@one_sentence
def pause_command(name: str, key: str | None) -> None:
    """Let no more jobs with this limit start until it is resumed; running jobs go on."""
    limit = Limits(_state())[name].pause(key, this_user())
    click.echo(f"{_subject(limit, key)} is paused")


@limits_commands.command("resume")
@_name_argument
@_key_option
@one_sentence
def resume_command(name: str, key: str | None) -> None:
    """Let jobs with this limit start again."""
    limit = Limits(_state())[name].resume(key, this_user())
    click.echo(f"{_subject(limit, key)} is not paused")


def _state() -> AppState:
    """The state of the app, whose modules with jobs are imported, as in a worker."""
    state = current_state()
    import_jobs(state)
    return state


def _subject(limit: LimitState, key: str | None) -> str:
    return one_line(f"Limit {limit.name}" if key is None else f"Limit {limit.name}, key {key}")


def _paused(limit: LimitState) -> str:
    if limit.paused_at is None:
        return ""
    by = f" by {limit.paused_by}" if limit.paused_by else ""
    return f"paused since {limit.paused_at:%Y-%m-%d %H:%M:%S} UTC{by}"


def _cells(limit: LimitState, key: KeyRow) -> tuple[object, ...]:
    left = limit.rate_left(key)
    waiting = key.waiting + key.parked
    return (
        one_line(key.name) or "(none)",
        f"{key.held:,}",
        f"{MAX_COUNTED:,}+" if waiting > MAX_COUNTED else f"{waiting:,}",
        "" if left is None else f"{left:,}",
        "" if key.next_in is None else f"in {max(0.0, key.next_in):.1f} s",
        "paused" if key.paused_at is not None else "",
    )
