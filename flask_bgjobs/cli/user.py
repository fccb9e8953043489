"""Who uses the command line, for the audit trail."""

from __future__ import annotations

import getpass
import os

from ..store import Actor


def this_user(reason: str | None = None) -> Actor:
    """The user of the operating system.

    :param reason: by what many jobs were chosen.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # In a container a user need not have a name.
        name = f"user {os.getuid()}"
    return Actor(name, "command line", reason)
