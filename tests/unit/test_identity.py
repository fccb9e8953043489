"""Who a process is, and whether it is gone."""

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
    "import sys; from flask_bgjobs.system.identity import this_process; "
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


@pytest.mark.parametrize(
    "process", ["", "/", "nonsense", "a/b/c", "a/b/-1/5", "a/b/0/5", f"a/b/{10**30}/5", "a//"]
)
def test_nonsense_in_the_column(process: str) -> None:
    """A text that is no identity never makes anybody gone."""
    assert not is_gone(process)


@needs_proc
@pytest.mark.parametrize("pid", ["0", "-1", str(10**30)])
def test_number_that_is_no_pid(pid: str) -> None:
    """A number that no process can have never makes anybody gone."""
    assert not is_gone(changed(1, pid))


WITHOUT_DESCRIPTORS = """
import contextlib, resource, sys, threading
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
kept = []
with contextlib.suppress(OSError):
    while True:
        kept.append(open("/dev/null"))
answers = {is_gone(sys.argv[1])}
# One that comes and goes, as other threads open and close files.
kept.pop().close()
sys.setswitchinterval(1e-6)
is_over = False
def open_and_close():
    while not is_over:
        with contextlib.suppress(OSError), open("/dev/null"):
            pass
thread = threading.Thread(target=open_and_close)
thread.start()
answers.update(is_gone(sys.argv[1]) for _ in range(5_000))
is_over = True
thread.join()
print(*answers)
"""


@needs_proc
def test_without_descriptors() -> None:
    """A process that has used up its descriptors takes nobody for gone who lives."""
    assert THIS.process
    code = "from flask_bgjobs.system.identity import is_gone\n" + WITHOUT_DESCRIPTORS
    done = subprocess.run(
        [sys.executable, "-c", code, THIS.process], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["False"], done.stderr


@needs_proc
def test_file_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose file in /proc cannot be opened is not gone as long as it exists."""
    assert THIS.process
    read_text = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "stat":
            raise OSError(errno.EMFILE, "Too many open files")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    assert not is_gone(THIS.process)
    assert is_gone(changed(1, "99999999"))


HIDDEN = """
# A mount of its own: the options of the machine's /proc hold for all.
mount -t proc -o hidepid=2 proc /proc || exit 7
exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
"""


@needs_proc
@pytest.mark.skipif(os.getuid() != 0, reason="only root may change how /proc is mounted")
def test_processes_hidden_from_other_users() -> None:
    """Where /proc hides the processes of other users, as under systemd's ``ProtectProc=invisible``,
    one that lives is not gone, and one that has ended is."""
    assert THIS.process
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
    words = [sys.executable, "-I", "-c", code, str(os.getpid()), THIS.process, process]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", HIDDEN, "sh", *words],
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    if done.returncode in (1, 7):
        pytest.skip(f"/proc cannot be mounted anew here: {done.stderr.strip()}")
    assert done.stdout.split() == ["False", "False", "True"], done.stderr
