"""The user of the command line, for the audit trail."""

from __future__ import annotations

import getpass
import os

from ..store import Actor


def this_user(reason: str | None = None) -> Actor:
    """The user of the operating system.

    :param reason: the selection by which jobs were chosen, in words.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # In a container, the user may have no name.
        name = f"user {os.getuid()}"
    return Actor(name, "command line", reason)
