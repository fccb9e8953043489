"""Dramatiq on Redis."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from .. import journal
from ..contender import URL_VARIABLE

dramatiq.set_broker(RedisBroker(url=os.environ[URL_VARIABLE]))


@dramatiq.actor
def record(number: int) -> None:
    """The measured job."""
    journal.record(number)
