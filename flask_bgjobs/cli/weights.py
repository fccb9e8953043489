"""Commands about the weights of keys: ``weights list``, ``override`` and ``reset``."""

from __future__ import annotations

import click
from flask.cli import AppGroup

from ..flow.fairness.data import drift, weight_data
from ..flow.fairness.manage import WeightState, find, list_weights
from ..job.text import one_line
from ..state import current_state
from .group import bgjobs_commands, json_option, one_sentence
from .output import print_json, print_table
from .user import this_user

_key_argument = click.argument("key")


@bgjobs_commands.group("weights", cls=AppGroup, invoke_without_command=True)
@json_option
@click.pass_context
def weights_commands(context: click.Context, as_json: bool) -> None:
    """Show the weights of keys, and change them at run time; without a command: list."""
    if context.invoked_subcommand is None:
        context.invoke(list_command, as_json=as_json)


@weights_commands.command("list")
@json_option
@one_sentence
def list_command(as_json: bool) -> None:
    """List the weights that are configured or overridden, by key."""
    weights = list_weights(current_state())
    if as_json:
        print_json([weight_data(each) for each in weights])
    elif weights:
        header = ["KEY", "WEIGHT", "CONFIGURED", "OVERRIDDEN"]
        print_table(header, [_cells(each) for each in weights])
    else:
        click.echo("All keys have the weight 1: give some another one in BGJOBS_WEIGHTS")


@weights_commands.command("override")
@_key_argument
@click.argument("weight", type=float)
@one_sentence
def override_command(key: str, weight: float) -> None:
    """Replace the weight of a key until it is reset; acts on all workers."""
    changed = find(current_state(), key).override(weight, this_user())
    click.echo(one_line(f"Weight of {changed.key}: {drift(changed)}"))


@weights_commands.command("reset")
@_key_argument
@one_sentence
def reset_command(key: str) -> None:
    """Remove the override of a weight, so that the one in the configuration applies."""
    weight = find(current_state(), key).reset(this_user())
    click.echo(one_line(f"Weight of {weight.key} is as in the configuration: {weight.weight:g}"))


def _cells(weight: WeightState) -> tuple[object, ...]:
    at = weight.overridden_at
    when = "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
    by = f" by {weight.overridden_by}" if weight.overridden_by else ""
    return one_line(weight.key), f"{weight.weight:g}", f"{weight.code:g}", one_line(when + by)
