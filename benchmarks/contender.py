"""What every queue that is measured can do."""

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
    """A queue with settings as its documentation recommends them for many small jobs.

    The same class serves on both sides. ``prepare`` and the enqueues run in a process of their
    own that stands for the web process, and import the queue; all else runs in the harness, which
    imports none.

    :param url: of an empty store of the right kind, as SQLAlchemy writes it.
    """

    name: ClassVar[str]
    """For ``--only``."""
    title: ClassVar[str]
    """For the tables."""
    store: ClassVar[StoreKind]
    """Where its jobs live."""
    needs: ClassVar[Sequence[str]] = ()
    """Modules that must be installed."""
    has_bulk: ClassVar[bool] = False
    """Whether :meth:`enqueue_in_bulk` is there."""
    jobs: ClassVar[int] = 20_000
    """How many jobs of no work keep it busy for a few seconds."""

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot be measured here; ``None``: it can."""
        missing = [module for module in cls.needs if importlib.util.find_spec(module) is None]
        return f"{', '.join(missing)} is not installed" if missing else None

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make what the queue needs in its empty store."""

    @abc.abstractmethod
    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        """A job for each number, each on its own and safe when its call returns."""

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        """The same in the fewest calls, where the queue has a way for it."""
        raise NotImplementedError(f"{self.title} has no bulk enqueue")

    @abc.abstractmethod
    def worker_command(self) -> list[str]:
        """What starts one worker."""

    def environment(self) -> dict[str, str]:
        """Variables for the worker and the enqueuing process."""
        return {URL_VARIABLE: self.url}

    @abc.abstractmethod
    def unsettled(self) -> int:
        """Jobs in the store that are not recorded as done."""

    def close(self) -> None:  # noqa: B027  # not all hold on to one
        """Let go of the store."""


class SqlContender(Contender):
    """A queue that keeps its jobs in a database."""

    unsettled_query: ClassVar[str]
    """Counts the jobs that are not recorded as done."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)

    def unsettled(self) -> int:
        return self.count(self.unsettled_query)

    def count(self, query: str) -> int:
        """What a query counts."""
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
        """Nothing has to be made."""

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
    """A URL of PostgreSQL without SQLAlchemy's name of the driver."""
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``numbers`` in parts of ``size``; the last may be smaller."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
