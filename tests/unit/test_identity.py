"""The identity of a process, and whether the process is gone."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flask_bgjobs.system import identity
from flask_bgjobs.system.identity import is_gone, this_process
from tests.unit.helpers import wait_until

THIS_PROCESS = this_process()
needs_proc = pytest.mark.skipif(THIS_PROCESS.process is None, reason="the system has no /proc")


def with_changed_part(part: int, value: str) -> str:
    """This process's identity with one part changed: machine, pid or start time."""
    parts = (THIS_PROCESS.process or "").rsplit("/", 2)
    parts[part] = value
    return "/".join(parts)


def test_identity_of_this_process() -> None:
    """A process knows its host and pid, and its identity does not change."""
    assert (THIS_PROCESS.host, THIS_PROCESS.pid) == (socket.gethostname()[:255], os.getpid())
    assert this_process() == THIS_PROCESS


def test_this_process_is_not_gone() -> None:
    """The current process is not gone."""
    assert not is_gone(THIS_PROCESS.process)


def test_unknown_identity_is_not_gone() -> None:
    """A process without a known identity is never regarded as gone."""
    assert is_gone(None) is False


@needs_proc
def test_identity_fits_column() -> None:
    """The identity is a string of at most 255 characters."""
    assert isinstance(THIS_PROCESS.process, str)
    assert len(THIS_PROCESS.process) <= 255


CHILD = (
    "import sys; from flask_bgjobs.system.identity import this_process; "
    "print(this_process().process, flush=True); sys.stdin.read()"
)


@needs_proc
@pytest.mark.slow
def test_ended_child_is_gone() -> None:
    """A child process is gone as soon as it has ended, even before it is reaped."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        process = child.stdout.readline().strip()
        assert process != THIS_PROCESS.process
        assert not is_gone(process)
        child.stdin.close()
        wait_until(lambda: is_gone(process))
        assert child.returncode is None, "the child must not be reaped yet"
        child.wait(30)
        assert is_gone(process)


@needs_proc
def test_reused_pid() -> None:
    """A process is gone if another process has its pid now."""
    assert is_gone(with_changed_part(2, "1"))


@needs_proc
def test_unused_pid() -> None:
    """A process is gone if no process has its pid."""
    assert is_gone(with_changed_part(1, "99999999"))


@needs_proc
@pytest.mark.parametrize("pid", ["99999999", str(os.getpid())], ids=["free", "taken"])
def test_process_of_other_machine(pid: str) -> None:
    """A process of another boot, machine or container is never regarded as gone."""
    machine, _, started = (THIS_PROCESS.process or "").rsplit("/", 2)
    boot, namespace = machine.split("/", 1)
    for other in (f"other-boot/{namespace}", f"{boot}/pid:[1]"):
        assert not is_gone(f"{other}/{pid}/{started}")
        assert not is_gone(f"{other}/{pid}/1")


def test_system_without_proc(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``/proc``, only host and pid are known, and no process is regarded as gone."""
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    assert this_process().process is None
    assert this_process().pid == os.getpid()
    assert not is_gone(f"boot/pid:[1]/{os.getpid()}/123")


@pytest.mark.parametrize(
    "process", ["", "/", "nonsense", "a/b/c", "a/b/-1/5", "a/b/0/5", f"a/b/{10**30}/5", "a//"]
)
def test_invalid_identity(process: str) -> None:
    """An invalid identity never means that a process is gone."""
    assert not is_gone(process)


@needs_proc
@pytest.mark.parametrize("pid", ["0", "-1", str(10**30)])
def test_invalid_pid(pid: str) -> None:
    """A number that cannot be a pid never means that a process is gone."""
    assert not is_gone(with_changed_part(1, pid))


WITHOUT_DESCRIPTORS = """
import contextlib, resource, sys, threading
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
kept = []
with contextlib.suppress(OSError):
    while True:
        kept.append(open("/dev/null"))
answers = {is_gone(sys.argv[1])}
# One descriptor is free from time to time, as if other threads opened and closed files.
kept.pop().close()
sys.setswitchinterval(1e-6)
stopped = False
def open_and_close():
    while not stopped:
        with contextlib.suppress(OSError), open("/dev/null"):
            pass
thread = threading.Thread(target=open_and_close)
thread.start()
answers.update(is_gone(sys.argv[1]) for _ in range(5_000))
stopped = True
thread.join()
print(*answers)
"""


@needs_proc
@pytest.mark.slow
def test_no_free_file_descriptors() -> None:
    """Without free file descriptors, a living process is not regarded as gone."""
    assert THIS_PROCESS.process
    code = "from flask_bgjobs.system.identity import is_gone\n" + WITHOUT_DESCRIPTORS
    result = subprocess.run(
        [sys.executable, "-c", code, THIS_PROCESS.process],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.split() == ["False"], result.stderr


@needs_proc
def test_proc_file_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose file in ``/proc`` cannot be opened is gone only if it does not exist."""
    assert THIS_PROCESS.process
    read_text = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "stat":
            raise OSError(errno.EMFILE, "Too many open files")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    assert not is_gone(THIS_PROCESS.process)
    assert is_gone(with_changed_part(1, "99999999"))


HIDDEN = """
# Mount a separate /proc: its options would otherwise change for the whole machine.
mount -t proc -o hidepid=2 proc /proc || exit 7
exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
"""


@needs_proc
@pytest.mark.skipif(os.getuid() != 0, reason="only root may change how /proc is mounted")
@pytest.mark.slow
def test_processes_hidden_from_other_users() -> None:
    """If ``/proc`` hides other users' processes, only an ended process is gone.

    systemd's ``ProtectProc=invisible`` does this.
    """
    assert THIS_PROCESS.process
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        process = child.stdout.readline().strip()
        child.stdin.close()
        child.wait(30)
    code = Path(identity.__file__).read_text() + (
        "\nimport sys\nprint(os.path.exists(f'/proc/{sys.argv[1]}'), *map(is_gone, sys.argv[2:]))"
    )
    command = [sys.executable, "-I", "-c", code, str(os.getpid()), THIS_PROCESS.process, process]
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", HIDDEN, "sh", *command],
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    if result.returncode in (1, 7):
        pytest.skip(f"/proc cannot be mounted here: {result.stderr.strip()}")
    assert result.stdout.split() == ["False", "False", "True"], result.stderr
