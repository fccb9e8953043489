"""The command group, shared options and parameter types."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError

from ..config import check_queue
from ..errors import BgJobsError
from ..job import durations
from ..job.text import one_line
from ..store import database_sentence

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    # Generic only since click 8.2.
    _ParamType = click.ParamType

P = ParamSpec("P")
R = TypeVar("R")

bgjobs_commands = AppGroup("bgjobs", help="Run a worker, and manage background jobs.")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def one_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator that prints expected errors as one sentence and exits with code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BgJobsError as error:
            raise click.ClickException(one_line(str(error))) from None
        except DBAPIError as error:
            raise click.ClickException(database_sentence(error)) from None

    return wrapped


class QueueNames(_ParamType):
    """Names of queues, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return [check_queue(name.strip()) for name in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NumberRange(click.FloatRange):
    """A number within bounds. NaN is refused, which :class:`click.FloatRange` accepts."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Duration(_ParamType):
    """Seconds, or a number with a unit: 90s, 15m, 2h, 7d."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return durations.parse(value, "it")
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Moment(_ParamType):
    """A time: a duration before now, or ISO 8601, which is UTC unless it has a time zone."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        with contextlib.suppress(ValueError):
            return dt.timedelta(seconds=durations.parse(value, "it"))
        try:
            moment = dt.datetime.fromisoformat(value)
            return (
                moment if moment.tzinfo is None else moment.astimezone(dt.UTC).replace(tzinfo=None)
            )
        except (ValueError, OverflowError):
            self.fail(
                "it must be a duration before now like 90s, 15m, 2h or 7d, or a time like "
                f"2026-11-23T12:00, not {value!r}",
                param,
                ctx,
            )
