"""The interface of the measured queues."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import sqlalchemy as sa

StoreKind = Literal["sqlite", "postgresql", "mariadb", "redis"]
URL_VARIABLE = "BENCHMARK_URL"
"""The environment variable that holds the URL of the store, for the modules in ``apps``."""


class Contender(abc.ABC):
    """A queue, with the settings that its documentation recommends for many small jobs.

    The same class is used in two processes. ``prepare`` and the enqueue methods run in a separate
    process, in the role of the web process, and import the queue. All other methods run in the
    harness, which does not import it.

    :param url: of an empty store of the right kind, as SQLAlchemy writes it.
    """

    name: ClassVar[str]
    """Its name for ``--only``."""
    title: ClassVar[str]
    """Its name in the tables."""
    store: ClassVar[StoreKind]
    """The kind of store for its jobs."""
    needs: ClassVar[Sequence[str]] = ()
    """Modules that must be installed."""
    has_bulk: ClassVar[bool] = False
    """Whether :meth:`enqueue_in_bulk` is implemented."""
    jobs: ClassVar[int] = 20_000
    """Number of empty jobs that keep it busy for a few seconds."""

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    def unavailable(cls) -> str | None:
        """The reason why it cannot be measured here, or ``None``."""
        missing = [module for module in cls.needs if importlib.util.find_spec(module) is None]
        return f"{', '.join(missing)} is not installed" if missing else None

    @abc.abstractmethod
    def prepare(self) -> None:
        """Create the tables or other objects that the queue needs."""

    @abc.abstractmethod
    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        """Enqueue a job for each number, one by one. Each job is stored when its call returns."""

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        """Enqueue a job for each number in as few calls as possible."""
        raise NotImplementedError(f"{self.title} has no bulk enqueue")

    @abc.abstractmethod
    def worker_command(self) -> list[str]:
        """The command that starts one worker."""

    def environment(self) -> dict[str, str]:
        """Environment variables for the worker and the enqueuing process."""
        return {URL_VARIABLE: self.url}

    @abc.abstractmethod
    def unsettled(self) -> int:
        """The number of jobs in the store that are not recorded as done."""

    def close(self) -> None:  # noqa: B027  # not all contenders keep a connection
        """Close the connection to the store."""


class SqlContender(Contender):
    """A queue that keeps its jobs in a database."""

    unsettled_query: ClassVar[str]
    """The query for :meth:`unsettled`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)

    def unsettled(self) -> int:
        return self.count(self.unsettled_query)

    def count(self, query: str) -> int:
        """The result of a query that counts rows."""
        with self.engine.connect() as connection:
            return int(connection.exec_driver_sql(query).scalar_one())

    def close(self) -> None:
        self.engine.dispose()


class RedisContender(Contender):
    """A queue that keeps its jobs in Redis."""

    store = "redis"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._redis: Any = None

    def prepare(self) -> None:
        """Redis needs no preparation."""

    def unsettled(self) -> int:
        if self._redis is None:
            import redis

            self._redis = redis.Redis.from_url(self.url)
        return self.unsettled_in(self._redis)

    @abc.abstractmethod
    def unsettled_in(self, redis: Any) -> int:
        """Jobs in this database that are not recorded as done.

        :param redis: a client.
        """

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()


def libpq_url(url: str) -> str:
    """A PostgreSQL URL without the driver name of SQLAlchemy."""
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Split ``numbers`` into parts of ``size``; the last part may be smaller."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
