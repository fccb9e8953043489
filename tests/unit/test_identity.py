"""Who a process is, and whether it is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from flask_bgjobs import identity
from flask_bgjobs.identity import is_gone, this_process
from tests.unit.helpers import wait_until

THIS = this_process()
needs_proc = pytest.mark.skipif(THIS.process is None, reason="the system has no /proc")


def changed(part: int, value: str) -> str:
    """This process with one part of its identity changed: machine, pid or start time."""
    parts = (THIS.process or "").rsplit("/", 2)
    parts[part] = value
    return "/".join(parts)


def test_this_process() -> None:
    """A process knows its host and pid, and is the same whenever it is asked."""
    assert (THIS.host, THIS.pid) == (socket.gethostname()[:255], os.getpid())
    assert this_process() == THIS


def test_alive() -> None:
    """This process is not gone."""
    assert not is_gone(THIS.process)


def test_unknown() -> None:
    """A process that the system could not tell is never taken for gone."""
    assert is_gone(None) is False


@needs_proc
def test_fits_its_column() -> None:
    """The identity is a text of at most 255 characters."""
    assert isinstance(THIS.process, str)
    assert len(THIS.process) <= 255


CHILD = (
    "import sys; from flask_bgjobs.identity import this_process; "
    "print(this_process().process, flush=True); sys.stdin.read()"
)


@needs_proc
def test_child() -> None:
    """A child process is there while it runs, and gone as soon as it ended, even unreaped."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        process = child.stdout.readline().strip()
        assert process != THIS.process
        assert not is_gone(process)
        child.stdin.close()
        wait_until(lambda: is_gone(process))
        assert child.returncode is None, "the test shall see it before it is reaped"
        child.wait(30)
        assert is_gone(process)


@needs_proc
def test_pid_used_again() -> None:
    """A process whose pid another one has now is gone."""
    assert is_gone(changed(2, "1"))


@needs_proc
def test_pid_that_is_free() -> None:
    """A process whose pid nobody has is gone."""
    assert is_gone(changed(1, "99999999"))


@needs_proc
@pytest.mark.parametrize("pid", ["99999999", str(os.getpid())], ids=["free", "taken"])
def test_out_of_sight(pid: str) -> None:
    """A process of another boot, machine or container is never taken for gone."""
    machine, _, started = (THIS.process or "").rsplit("/", 2)
    boot, namespace = machine.split("/", 1)
    for other in (f"other-boot/{namespace}", f"{boot}/pid:[1]"):
        assert not is_gone(f"{other}/{pid}/{started}")
        assert not is_gone(f"{other}/{pid}/1")


def test_system_without_proc(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells nothing, the identity is host and pid, and nobody is gone."""
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    assert this_process().process is None
    assert this_process().pid == os.getpid()
    assert not is_gone(f"boot/pid:[1]/{os.getpid()}/123")
