"""The log of the demo: one line for each stage of a job, on a terminal where jobs fail on purpose.

Their tracebacks are on the dashboard.
"""

from __future__ import annotations

import logging


class OneLine(logging.Formatter):
    """Level and message, without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return f"{record.levelname} {record.getMessage()}"


def turn_on() -> None:
    """Print the lines about jobs in this way."""
    logger = logging.getLogger("flask_bgjobs")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
