"""The group of commands, and what all of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError, OperationalError

from ..config import check_queue
from ..errors import BgJobsError
from ..text import one_line

P = ParamSpec("P")
R = TypeVar("R")

bgjobs_commands = AppGroup("bgjobs", help="Background jobs: run a worker, see and change jobs.")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def one_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what goes wrong into one sentence and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BgJobsError as error:
            raise click.ClickException(one_line(str(error))) from None
        except DBAPIError as error:
            raise click.ClickException(one_line(_database_sentence(error))) from None

    return wrapped


def _database_sentence(error: DBAPIError) -> str:
    text = str(error.orig)
    if isinstance(error, OperationalError) and "no such table" in text:
        return f"{text}: run `flask db upgrade`, or `flask bgjobs init-db` without Flask-Migrate"
    return f"the database refused: {text}"


class QueueNames(click.ParamType[Any]):
    """Names of queues, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return [check_queue(name.strip()) for name in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)
