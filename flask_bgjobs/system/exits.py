"""Text for the exit codes of processes."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """The end of a process as text: ``exited with code 1``, ``was killed by SIGKILL``.

    :param code: the exit code; a negative number is that of a signal.
    """
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
