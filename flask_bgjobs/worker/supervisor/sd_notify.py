"""Notify systemd of the state of a ``Type=notify`` service, by the ``sd_notify(3)`` protocol."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*states: str) -> bool:
    """Send state changes to systemd. Never raises.

    :param states: lines such as ``READY=1``, ``STOPPING=1`` or ``STATUS=…``.
    :returns: whether they were sent; ``False`` without ``NOTIFY_SOCKET`` or on an error.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        # Linux's abstract namespace.
        address = f"\0{address[1:]}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(states).encode(), address)
        return True
    return False
