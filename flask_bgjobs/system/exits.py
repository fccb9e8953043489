"""How processes end, in words."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """How a process ended, such as ``exited with code 1`` or ``was killed by SIGKILL``.

    :param code: its exit code, negative for the number of a signal.
    """
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
