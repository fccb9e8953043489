"""All contenders, in the order of the tables."""

from __future__ import annotations

from ..contender import Contender
from . import bgjobs, celery, dramatiq, huey, pgqueuer, procrastinate, rq

ALL: dict[str, type[Contender]] = {
    contender.name: contender
    for module in (bgjobs, huey, pgqueuer, procrastinate, dramatiq, rq, celery)
    for contender in module.CONTENDERS
}
