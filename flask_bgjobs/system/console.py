"""Log lines on the terminal, for commands of apps that do not configure logging."""

from __future__ import annotations

import logging

_logger = logging.getLogger("flask_bgjobs")


def show_logs() -> None:
    """Print the stages of jobs to stderr, unless the host has configured logging."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        _logger.addHandler(handler)
