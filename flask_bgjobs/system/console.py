"""Log lines on the terminal, for commands of apps that have not set logging up."""

from __future__ import annotations

import logging

_logger = logging.getLogger("flask_bgjobs")


def show_logs() -> None:
    """Print the stages of jobs to stderr, unless the host has set logging up by itself."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        _logger.addHandler(handler)
