"""The log format of the demo: one line for each stage of a job, without tracebacks.

The demo's jobs fail on purpose; their tracebacks are shown on the dashboard.
"""

from __future__ import annotations

import logging


class OneLine(logging.Formatter):
    """Formats a record as level and message, without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for a record."""
        return f"{record.levelname} {record.getMessage()}"


def turn_on() -> None:
    """Print the lines of flask-bgjobs in this format."""
    logger = logging.getLogger("flask_bgjobs")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
