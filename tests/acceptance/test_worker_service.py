"""The worker under systemd, and with ``--reload``."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from tests.acceptance.helpers import enqueue
from tests.conftest import DEADLINE_SECONDS, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]


def test_worker_notifies_systemd(
    app: Flask, start_worker: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ``Type=notify`` the worker notifies systemd when it is ready and when it stops."""
    name = f"bgjobs-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(DEADLINE_SECONDS)
        worker = start_worker("-n", "me")
        assert systemd.recv(4096) == b"READY=1\nSTATUS=Worker me is ready for jobs"
        worker.send_signal(signal.SIGTERM)
        assert systemd.recv(4096).startswith(b"STOPPING=1\n")
        assert worker.wait(DEADLINE_SECONDS) == 0


def test_reload_restarts_the_worker(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """With ``--reload`` a changed file restarts the worker, which releases its jobs first. A file
    that cannot be imported does not end the reloader, and Ctrl-C ends both processes."""
    worker = start_worker("--reload")
    old = enqueue("process_id").wait(DEADLINE_SECONDS).result
    assert old != worker.pid
    journal = tmp_path / "journal"
    held = enqueue("hold", str(journal), 600)
    wait_until(journal.exists, "the start")
    host = (tmp_path / "host.py").read_text()
    (tmp_path / "host.py").write_text(f"{host}\nthis is no Python\n")
    wait_until(lambda: held.refresh().status == "pending", "the release")
    wait_until(lambda: "SyntaxError" in worker.log.read_text(), "the failure")
    assert worker.poll() is None
    (tmp_path / "host.py").write_text(host)
    new = enqueue("process_id").wait(DEADLINE_SECONDS).result
    assert new not in (old, worker.pid)
    assert "host.py has changed; restarting the worker" in worker.log.read_text()
    worker.send_signal(signal.SIGINT)
    assert worker.wait(DEADLINE_SECONDS) == 0
    wait_until(lambda: not Path(f"/proc/{new}").exists(), "the end of the worker")
