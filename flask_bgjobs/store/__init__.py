"""All SQL statements that change rows, with one store class per database."""

from __future__ import annotations

import sqlalchemy as sa

from ..errors import DatabaseNotSupported
from .base import Store
from .database import CommitInDoubt, Host, QueryTimeout
from .dialects.mysql import MysqlStore
from .dialects.postgresql import PostgresStore
from .dialects.sqlite import SqliteStore, advice, is_in_memory
from .errors import MAKE_TABLES, database_sentence, is_missing_table
from .sizes import batches, statement_bytes
from .statements.admit import Admitted
from .statements.audit import Actor
from .statements.enqueue import NewJobs, Unique
from .statements.handover import HandedOver
from .statements.heal import Cursors, Healed
from .statements.limit_keys import effective_rule
from .statements.limits import MAX_COUNTED, KeyRow
from .statements.manual import DONE, ActionResult
from .statements.progress import LeaseView
from .statements.promote import Work
from .statements.prune import PruneCursor, Pruned, Retention
from .statements.schedule import Fired, Plan, Run, ScheduleChange, Skip
from .statements.select import Conditions, Selection
from .statements.waiting import MAX_NAMES, CodeWait
from .statements.weights import KeyTurns

__all__ = [
    "DONE",
    "MAKE_TABLES",
    "MAX_COUNTED",
    "MAX_NAMES",
    "ActionResult",
    "Actor",
    "Admitted",
    "CodeWait",
    "CommitInDoubt",
    "Conditions",
    "Cursors",
    "Fired",
    "HandedOver",
    "Healed",
    "Host",
    "KeyRow",
    "KeyTurns",
    "LeaseView",
    "NewJobs",
    "Plan",
    "PruneCursor",
    "Pruned",
    "QueryTimeout",
    "Retention",
    "Run",
    "ScheduleChange",
    "Selection",
    "Skip",
    "Store",
    "Unique",
    "Work",
    "advice",
    "batches",
    "database_sentence",
    "effective_rule",
    "is_in_memory",
    "is_missing_table",
    "make_store",
    "statement_bytes",
]

_STORES: dict[str, type[Store]] = {
    "sqlite": SqliteStore,
    "postgresql": PostgresStore,
    "mysql": MysqlStore,
    "mariadb": MysqlStore,
}


def make_store(engine: sa.Engine, host: Host, *, schema: str | None, max_crashes: int) -> Store:
    """Create the store for the engine's database, without connecting to it.

    :raises DatabaseNotSupported: when the database or the driver is not supported.
    """
    name = engine.dialect.name
    try:
        store = _STORES[name]
    except KeyError:
        raise DatabaseNotSupported(
            f"flask-bgjobs has no store for {name} in this version; it runs on "
            f"{', '.join(_STORES)}. Name a bind on one of these with BGJOBS_BIND_KEY"
        ) from None
    if engine.driver not in store.drivers or engine.dialect.is_async:
        urls = " or ".join(_url(name, driver) for driver in store.drivers)
        raise DatabaseNotSupported(
            "flask-bgjobs does not work with the driver "
            f"{engine.url.get_driver_name()}: write the URL as {urls}"
        )
    return store(engine, host, schema=schema, max_crashes=max_crashes)


def _url(database: str, driver: str) -> str:
    # SQLAlchemy calls the standard library's driver "pysqlite", but URLs do not name it.
    return f"{database}:///…" if driver == "pysqlite" else f"{database}+{driver}://…"
