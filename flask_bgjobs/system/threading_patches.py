"""Detects gevent and eventlet, which replace threads by greenlets; a lock that works with them."""

from __future__ import annotations

import sys
import threading


def patched_by() -> str | None:
    """The library that has replaced this process's threads by greenlets, or ``None``."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None


def refusal(library: str) -> str:
    """The message that says why no worker runs in such a process, and what to do instead.

    :param library: from :func:`patched_by`.
    """
    return (
        f"{library} has patched the threads of this process, and jobs in greenlets could be "
        "neither cancelled nor timed out: run `flask bgjobs worker` as a separate process, and "
        "patch only in the web server (`gunicorn --worker-class gevent`), not in a module of the "
        "app"
    )


class Lock:
    """A lock that works even if threads are patched after it was made.

    ``gunicorn --preload`` builds the app before its gevent workers patch threads. A greenlet that
    waits for an unpatched lock blocks all greenlets, including the one that holds the lock.
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
