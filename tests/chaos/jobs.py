"""The jobs. Each notes its start and its end outside the database, and returns its attempt."""

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
"""Sleeps are a loop of short steps, so that an interruption arrives soon."""


_LARGE_CHARACTERS = 300_000


@functools.cache
def _journal() -> Journal:
    return Journal(Settings.from_environment().journal)


def quick(token: int) -> int:
    """Done at once."""
    with _journal().noted(token):
        return current_job.attempt


def sleeps(token: int, seconds: float) -> int:
    """Take some time."""
    with _journal().noted(token):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        return current_job.attempt


async def waits(token: int, seconds: float) -> int:
    """Take some time in an event loop."""
    with _journal().noted(token):
        await asyncio.sleep(seconds)
        return current_job.attempt


def fails_once(token: int) -> int:
    """Fail while no retry was used."""
    with _journal().noted(token):
        if current_job.retry_count == 0:
            raise RuntimeError("the first time fails")
        return current_job.attempt


def fails(token: int) -> int:
    """Fail every time."""
    with _journal().noted(token):
        raise RuntimeError("it fails every time")


def gives_up(token: int) -> int:
    """Ask for no more retries."""
    with _journal().noted(token):
        raise Fail("it will never work")


def asks_retry(token: int) -> int:
    """Ask for a retry once."""
    with _journal().noted(token):
        if current_job.retry_count == 0:
            raise Retry("not yet", delay=0.1)
        return current_job.attempt


def snoozes(token: int) -> int:
    """Snooze once, as its meta tells."""
    with _journal().noted(token):
        if not current_job.meta.get("rested"):
            current_job.meta["rested"] = True
            raise Snooze(0.2)
        return current_job.attempt


def kills_once(token: int) -> int:
    """Kill its own process at the first attempt."""
    with _journal().noted(token):
        if current_job.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return current_job.attempt


def poison(token: int) -> int:
    """Kill its own process every time."""
    with _journal().noted(token):
        os.kill(os.getpid(), signal.SIGKILL)
        return current_job.attempt


def forks(token: int) -> int:
    """Fork, and let the copy return."""
    with _journal().noted(token):
        copy = os.fork()
        if copy == 0:
            return -1
        os.waitpid(copy, 0)
        return current_job.attempt


def uses_helpers(token: int) -> int:
    """Let helper processes compute something."""
    with _journal().noted(token):
        with multiprocessing.get_context("fork").Pool(2) as helpers:
            assert helpers.map(abs, range(-10, 0)) == list(range(10, 0, -1))
        return current_job.attempt


def locks_its_row(token: int, seconds: float) -> int:
    """Keep its own row locked while it works; SQLite would lock all other rows as well."""
    with _journal().noted(token):
        db = current_app.extensions["sqlalchemy"]
        jobs = next(t for n, t in db.metadata.tables.items() if n.endswith("bgjobs_job"))
        own = sa.select(jobs.c.id).where(jobs.c.id == current_job.id)
        # Its own connection may be cut as well, which would be its own failure.
        with contextlib.suppress(DBAPIError):
            db.session.execute(own.with_for_update()).all()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        return current_job.attempt


def returns_much(token: int) -> list[Any]:
    """Return what takes three times its size in a statement."""
    with _journal().noted(token):
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
