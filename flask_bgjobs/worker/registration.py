"""Registration: a worker's row in the database, and its name there."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import BgJobsError
from ..job.text import shown
from ..state import AppState
from ..store import Store
from ..system.identity import this_process
from ..version import __version__

_MAX_NAME = 255


def register(
    state: AppState,
    name: str,
    *,
    store: Store | None = None,
    pool: str = "thread",
    concurrency: int = 1,
    queues: Sequence[str] | None = None,
    schedules: Sequence[str] | None = None,
) -> int:
    """Insert a worker row for this process, and return its id.

    :param schedules: the names of the schedules that it fires; ``None`` if it fires none.
    :param store: the store that inserts the row; default: the app's.
    """
    me = this_process()
    return (store or state.store).register_worker(
        {
            "name": name,
            "host": me.host,
            "pid": me.pid,
            "process": me.process,
            "version": __version__,
            "pool": pool,
            "concurrency": concurrency,
            "queues": None if queues is None else json.dumps(queues),
            "schedules": None if schedules is None else json.dumps(schedules),
            "beats": 0,
        }
    )


def checked_name(name: str | None) -> str | None:
    """Return ``name``, if the database can store it and a log line can show it.

    :raises BgJobsError: when it is too long, or holds control characters.
    """
    if name is not None and not (name.isprintable() and len(name) <= _MAX_NAME):
        raise BgJobsError(
            f"a worker's name has at most {_MAX_NAME} characters, and no control characters: "
            f"{shown(name)}"
        )
    return name
