"""Restart a worker when code changes; for development."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import BgJobsError
from ...system.signal_handlers import STOP_SIGNALS, handled

_IDLE_STOP_SECONDS, _STOP_SECONDS = 0.5, 5.0
"""How long a worker may take to stop: first until it gets a second signal, then until it is
killed."""


def watched_folders(root_path: str) -> list[Path]:
    """The working directory and the app's folder; only the outer one if one contains the other."""
    folders = {Path.cwd().resolve(), Path(root_path).resolve()}
    return sorted(f for f in folders if not any(other in f.parents for other in folders))


def run_with_reload(command: Sequence[str], folders: Iterable[Path]) -> int:
    """Run a command, and restart it when a Python file changes, until the process is interrupted.

    A command that has exited, for example after a syntax error, is started at the next change.

    :param folders: the folders to watch, with their subfolders.
    :returns: the exit code for the calling process: 0.
    :raises BgJobsError: when watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError:
        raise BgJobsError("--reload needs watchfiles: pip install 'flask-bgjobs[dev]'") from None
    stopped = threading.Event()
    changes = watchfiles.watch(
        *folders,
        watch_filter=watchfiles.PythonFilter(),
        stop_event=stopped,
        raise_interrupt=False,
    )
    with handled(STOP_SIGNALS, lambda *_: stopped.set()):
        process = subprocess.Popen(command)
        try:
            for change in changes:
                names = sorted({os.path.relpath(path) for _, path in change})
                print(f"{names[0]} has changed; restarting the worker", file=sys.stderr)
                _stop(process)
                process = subprocess.Popen(command)
        finally:
            _stop(process)
    return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker soon: the second signal ends the grace period of its jobs."""
    for seconds in (_IDLE_STOP_SECONDS, _STOP_SECONDS):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait()
