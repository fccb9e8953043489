"""The jobs. Each notes its start and its end outside the database, and returns its attempt."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time

from flask_bgjobs import Fail, Retry, Snooze, current_job

from .journal import Journal
from .settings import Settings

_STEP_SECONDS = 0.01
"""Sleeps are a loop of short steps, so that an interruption arrives soon."""


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
)
