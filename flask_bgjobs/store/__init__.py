"""Every statement that changes a row, one file per dialect."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import scoped_session

from ..errors import DatabaseNotSupported
from .audits import Actor
from .base import Store
from .by_hand import DONE, ActionResult
from .database import CommitInDoubt, QueryTimeout
from .inserts import NewJobs, unique_hash
from .mysql import MysqlStore
from .postgresql import PostgresStore
from .prunes import PruneCursor, Pruned, Retention
from .refusals import MAKE_TABLES, database_sentence, is_missing_table
from .runs import LeaseView
from .selections import Conditions, Selection
from .sqlite import SqliteStore, advice

__all__ = [
    "DONE",
    "MAKE_TABLES",
    "ActionResult",
    "Actor",
    "CommitInDoubt",
    "Conditions",
    "LeaseView",
    "NewJobs",
    "PruneCursor",
    "Pruned",
    "QueryTimeout",
    "Retention",
    "Selection",
    "Store",
    "advice",
    "database_sentence",
    "is_missing_table",
    "make_store",
    "unique_hash",
]

_STORES: dict[str, type[Store]] = {
    "sqlite": SqliteStore,
    "postgresql": PostgresStore,
    "mysql": MysqlStore,
    "mariadb": MysqlStore,
}


def make_store(
    engine: sa.Engine, session: scoped_session[Any], *, schema: str | None, max_crashes: int
) -> Store:
    """The store for the engine's dialect; nothing is connected yet.

    :raises DatabaseNotSupported: when there is none.
    """
    try:
        store = _STORES[engine.dialect.name]
    except KeyError:
        raise DatabaseNotSupported(
            f"flask-bgjobs has no store for {engine.dialect.name} in this version; it runs on "
            f"{', '.join(_STORES)}. Name a bind on one of these with BGJOBS_BIND_KEY"
        ) from None
    return store(engine, session, schema=schema, max_crashes=max_crashes)
