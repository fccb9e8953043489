"""The jobs. Each records its start and end outside the database, and returns its attempt."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import signal
import time
from typing import Any

import sqlalchemy as sa
from flask import current_app
from sqlalchemy.exc import DBAPIError

from flask_bgjobs import Fail, Retry, Snooze, current_job

from .journal import Journal
from .settings import Settings

_STEP_SECONDS = 0.01
"""Long sleeps are a loop of short ones, so that an interruption takes effect soon."""


_LARGE_CHARACTERS = 300_000


@functools.cache
def _journal() -> Journal:
    return Journal(Settings.from_environment().journal)


def quick(token: int) -> int:
    """Return at once."""
    with _journal().recorded(token):
        return current_job.attempt


def sleeps(token: int, seconds: float) -> int:
    """Sleep for ``seconds``."""
    with _journal().recorded(token):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        return current_job.attempt


async def waits(token: int, seconds: float) -> int:
    """Sleep for ``seconds`` in an event loop."""
    with _journal().recorded(token):
        await asyncio.sleep(seconds)
        return current_job.attempt


def fails_once(token: int) -> int:
    """Fail until a retry has been used."""
    with _journal().recorded(token):
        if current_job.retry_count == 0:
            raise RuntimeError("the first attempt fails")
        return current_job.attempt


def fails(token: int) -> int:
    """Fail every time."""
    with _journal().recorded(token):
        raise RuntimeError("it fails every time")


def gives_up(token: int) -> int:
    """Fail without a retry."""
    with _journal().recorded(token):
        raise Fail("it will never work")


def asks_retry(token: int) -> int:
    """Ask for a retry once."""
    with _journal().recorded(token):
        if current_job.retry_count == 0:
            raise Retry("not yet", delay=0.1)
        return current_job.attempt


def snoozes(token: int) -> int:
    """Snooze once; the meta records that it did."""
    with _journal().recorded(token):
        if not current_job.meta.get("rested"):
            current_job.meta["rested"] = True
            raise Snooze(0.2)
        return current_job.attempt


def kills_once(token: int) -> int:
    """Kill its own process at the first attempt."""
    with _journal().recorded(token):
        if current_job.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return current_job.attempt


def poison(token: int) -> int:
    """Kill its own process every time."""
    with _journal().recorded(token):
        os.kill(os.getpid(), signal.SIGKILL)
        return current_job.attempt


def forks(token: int) -> int:
    """Fork; the copy returns from the job."""
    with _journal().recorded(token):
        copy = os.fork()
        if copy == 0:
            return -1
        os.waitpid(copy, 0)
        return current_job.attempt


def uses_helpers(token: int) -> int:
    """Compute something in helper processes."""
    with _journal().recorded(token):
        with multiprocessing.get_context("fork").Pool(2) as helpers:
            assert helpers.map(abs, range(-10, 0)) == list(range(10, 0, -1))
        return current_job.attempt


def locks_its_row(token: int, seconds: float) -> int:
    """Lock its own row while it runs, except on SQLite, which would lock the whole database."""
    with _journal().recorded(token):
        db = current_app.extensions["sqlalchemy"]
        jobs = next(t for n, t in db.metadata.tables.items() if n.endswith("bgjobs_job"))
        own = sa.select(jobs.c.id).where(jobs.c.id == current_job.id)
        # A fault may also end this connection, and the job would then fail.
        with contextlib.suppress(DBAPIError):
            db.session.execute(own.with_for_update()).all()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        return current_job.attempt


def returns_much(token: int) -> list[Any]:
    """Return a large result that takes even more space in an SQL statement."""
    with _journal().recorded(token):
        return [current_job.attempt, '"' * _LARGE_CHARACTERS]


ALL = (
    quick,
    sleeps,
    waits,
    fails_once,
    fails,
    gives_up,
    asks_retry,
    snoozes,
    kills_once,
    poison,
    forks,
    uses_helpers,
    locks_its_row,
    returns_much,
)
