"""What a database says when it refuses, in words for people."""

from __future__ import annotations

import re

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..job.text import one_line
from .dialects.sqlite import advice

_MISSING_TABLE = re.compile(r"no such table|^relation .* does not exist$|^Table .* doesn't exist$")
MAKE_TABLES = (
    "run `flask db migrate`, then `flask db upgrade`; without Flask-Migrate, run "
    "`flask bgjobs init-db`. `db.create_all()` makes the tables only after `BgJobs(app)`"
)


def database_sentence(error: SQLAlchemyError) -> str:
    """What the database, or the way to it, has to say, on one line."""
    text = _said(error)
    if is_missing_table(error):
        return f"{text}: {MAKE_TABLES}"
    what_to_do = advice(error)
    return f"the database refused: {text}{f' ({what_to_do})' if what_to_do else ''}"


def is_missing_table(error: SQLAlchemyError) -> bool:
    """Whether a table that a statement names is not there."""
    return _MISSING_TABLE.search(_said(error)) is not None


def _said(error: SQLAlchemyError) -> str:
    said = error.orig if isinstance(error, DBAPIError) else error
    match getattr(said, "args", ()):
        case (int(), str(words)):
            # PyMySQL has the server's number before them.
            text = words
        case _:
            text = str(said)
    # PostgreSQL adds lines with the place in the statement.
    return one_line(text.partition("\n")[0])
