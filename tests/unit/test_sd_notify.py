"""What systemd is told."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from flask_bgjobs.worker.supervisor.sd_notify import notify


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service manager nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False


def test_a_socket_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager that does not listen any more stops no worker."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    assert notify("READY=1") is False


def test_the_states_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """All states of a call arrive as the lines of one message."""
    # A short path: that of a socket may not be longer than about a hundred bytes.
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        path = Path(folder, "notify")
        systemd.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert notify("READY=1", "STATUS=works") is True
        assert systemd.recv(100) == b"READY=1\nSTATUS=works"
