"""Start a worker anew when code changes; for development."""

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
"""For a worker to end by itself, and then to give its running jobs back before it is killed."""


def watched_folders(root_path: str) -> list[Path]:
    """The working directory and the app's own, without what lies inside another."""
    folders = {Path.cwd().resolve(), Path(root_path).resolve()}
    return sorted(f for f in folders if not any(other in f.parents for other in folders))


def run_with_reload(command: Sequence[str], folders: Iterable[Path]) -> int:
    """Run ``command``, anew at each change of a Python file below ``folders``, until interrupted.

    A command that ended by itself, as after a syntax error, is run again at the next change.

    :returns: the exit code for the process that calls this: 0.
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
                print(f"{names[0]} has changed; the worker starts anew", file=sys.stderr)
                _stop(process)
                process = subprocess.Popen(command)
        finally:
            _stop(process)
    return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker soon: the second signal ends the grace of its running jobs."""
    for seconds in (_IDLE_STOP_SECONDS, _STOP_SECONDS):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait()
