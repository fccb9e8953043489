"""Notifications to systemd."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from flask_bgjobs.worker.supervisor.sd_notify import notify


def test_without_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service manager, ``notify`` does nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False


def test_missing_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing socket raises no error."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    assert notify("READY=1") is False


def test_states_are_sent_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """All states of one call are sent as the lines of one message."""
    # tmp_path may be too long: the path of a socket has at most about 100 bytes.
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        path = Path(folder, "notify")
        systemd.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert notify("READY=1", "STATUS=works") is True
        assert systemd.recv(100) == b"READY=1\nSTATUS=works"
