"""Database errors as messages for people."""

from __future__ import annotations

import re

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..job.text import one_line
from .dialects.sqlite import advice

_MISSING_TABLE = re.compile(r"no such table|^relation .* does not exist$|^Table .* doesn't exist$")
MAKE_TABLES = (
    "run `flask db migrate`, then `flask db upgrade`; without Flask-Migrate, run "
    "`flask bgjobs init-db`. `db.create_all()` creates the tables only after `BgJobs(app)`"
)


def database_sentence(error: SQLAlchemyError) -> str:
    """The error of the database or of the connection as one line, with advice where known."""
    text = _message(error)
    if is_missing_table(error):
        return f"{text}: {MAKE_TABLES}"
    hint = advice(error)
    return f"the database refused: {text}{f' ({hint})' if hint else ''}"


def is_missing_table(error: SQLAlchemyError) -> bool:
    """Whether the error says that a table does not exist."""
    return _MISSING_TABLE.search(_message(error)) is not None


def _message(error: SQLAlchemyError) -> str:
    original = error.orig if isinstance(error, DBAPIError) else error
    match getattr(original, "args", ()):
        case (int(), str(message)):
            # PyMySQL's errors have the server's error number first.
            text = message
        case _:
            text = str(original)
    # PostgreSQL's further lines show the position in the statement.
    return one_line(text.partition("\n")[0])
