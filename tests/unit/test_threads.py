"""The threads that a worker needs to run."""

from __future__ import annotations

import threading

import pytest

from flask_bgjobs.errors import WorkerFailed
from flask_bgjobs.system.threads import WorkerThread, position_of, require_alive


def test_thread_failure_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A thread keeps and logs the exception that ended it, even a ``BaseException``."""

    def fail() -> None:
        raise SystemExit("descriptors")

    thread = WorkerThread(fail, "bgjobs-test")
    thread.start()
    thread.join()
    assert isinstance(thread.failure, SystemExit)
    assert "The thread bgjobs-test failed" in caplog.text
    with pytest.raises(WorkerFailed, match="thread bgjobs-test has ended: SystemExit: descriptors"):
        require_alive([thread])


def test_require_alive() -> None:
    """``require_alive`` raises only when a thread has ended."""
    stop = threading.Event()
    threads = [WorkerThread(stop.wait, f"bgjobs-{number}") for number in range(2)]
    for thread in threads:
        thread.start()
    require_alive(threads)
    assert "wait" in position_of(threads[0].ident or 0)
    stop.set()
    for thread in threads:
        thread.join()
    with pytest.raises(WorkerFailed, match=r"bgjobs-0 has ended$"):
        require_alive(threads)
    assert position_of(threads[0].ident or 0) == "an ended thread"
