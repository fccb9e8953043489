"""Whether gevent or eventlet has replaced threads by greenlets, and a lock that bears it."""

from __future__ import annotations

import sys
import threading


def patched_by() -> str | None:
    """The library that has replaced the threads of this process by greenlets, if one has."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None


def refusal(library: str) -> str:
    """Why no worker runs in such a process, and what to do instead."""
    return (
        f"{library} has patched the threads of this process, and jobs in greenlets could be "
        "neither cancelled nor timed out: run `flask bgjobs worker` as a process of its own, and "
        "patch only in the web server (`gunicorn --worker-class gevent`), not in a module of the "
        "app"
    )


class Lock:
    """A lock that also works when threads are patched after it was made.

    ``gunicorn --preload`` builds the app before its gevent workers patch threads. A greenlet that
    waits for a lock from before blocks all greenlets, also the one that holds the lock.
    """

    def __init__(self) -> None:
        self._renew()

    def __enter__(self) -> None:
        if self._made_by is not threading.Lock:
            self._renew()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _renew(self) -> None:
        self._made_by, self._lock = threading.Lock, threading.Lock()
