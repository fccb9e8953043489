"""The transaction rule, a test per sentence."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as _HostSession
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from werkzeug.exceptions import UnprocessableEntity

from flask_bgjobs import (
    BgJobs,
    DatabaseUnusable,
    InvalidJob,
    Job,
    JobNotCommitted,
    job_enqueued,
    run_background_job,
)
from flask_bgjobs.enqueue import transactions
from flask_bgjobs.operations.actions import delete, pause, retry
from flask_bgjobs.state import AppState, state_of
from tests import jobs
from tests.conftest import count_jobs, stored, wait_until
from tests.databases import END_CONNECTION, number_of


class Shop:
    """An app with a table of its own, its session and what was announced."""

    def __init__(
        self, url: str, *, session_class: type[Session] = _HostSession, **config: Any
    ) -> None:
        self.app = Flask("shop")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=url, BGJOBS_ALLOWED_JOBS=jobs.NAMES, SECRET_KEY="x", **config
        )
        self.db = SQLAlchemy(session_options={"class_": session_class})

        class Purchase(self.db.Model):  # type: ignore[name-defined]  # made at run time
            id = sa.Column(sa.Integer, primary_key=True)
            name = sa.Column(sa.String(50))

        self.purchase = Purchase
        self.db.init_app(self.app)
        BgJobs(self.app)
        self.announced: list[int] = []
        # Blinker holds receivers weakly.
        self._receiver = lambda app, job: self.announced.append(job.id)
        job_enqueued.connect(self._receiver, self.app)
        with self.app.app_context():
            self.db.create_all()

    @property
    def session(self) -> Any:
        return self.db.session

    def enqueue(self, **options: Any) -> Any:
        return run_background_job("tests.jobs.echo", parameters=[1], **options)

    def statement(self, kind: str) -> str:
        """A statement as this database knows it."""
        return _TEXTS[kind][self.db.engine.name == "mysql"]

    def exists(self, job: Any) -> bool:
        return state_of(self.app).store.get(job.id) is not None


@pytest.fixture
def shop(database_url: str) -> Any:
    shop = Shop(database_url)
    with shop.app.app_context():
        yield shop
        shop.session.remove()
    state_of(shop.app).store.dispose()
    with shop.app.app_context():
        shop.db.engine.dispose()


_WITH = "WITH x AS (SELECT name FROM purchase) "
_TEXTS = {
    "WITH": (
        _WITH + "INSERT INTO purchase (name) SELECT name FROM x",
        _WITH + "SELECT name FROM x",
    ),
    "unknown": ("ANALYZE", "DO 1"),
}
"""Statements for SQLite and PostgreSQL, and such as MySQL and MariaDB have."""

WRITES: dict[str, Callable[[Shop], Any]] = {
    "a pending object": lambda s: s.session.add(s.purchase(name="a")),
    "a flushed row": lambda s: (s.session.add(s.purchase(name="a")), s.session.flush()),
    "Core": lambda s: s.session.execute(sa.insert(s.purchase).values(name="a")),
    "text": lambda s: s.session.execute(sa.text("INSERT INTO purchase (name) VALUES ('a')")),
    "lower-case text after a comment": lambda s: s.session.execute(
        sa.text("/* note */ insert into purchase (name) values ('a')")
    ),
    "WITH": lambda s: s.session.execute(sa.text(s.statement("WITH"))),
    "unknown text": lambda s: s.session.execute(sa.text(s.statement("unknown"))),
    "a savepoint that is released": lambda s: _in_savepoint(s),
    "a savepoint that is rolled back": lambda s: _in_savepoint(s, roll_back=True),
}


def _in_savepoint(shop: Shop, roll_back: bool = False) -> None:
    nested = shop.session.begin_nested()
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    if roll_back:
        nested.rollback()
    else:
        nested.commit()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
class TestUncommittedWrites:
    def test_the_job_lands_with_the_commit(self, shop: Shop, write: Callable[[Shop], Any]) -> None:
        """A job joins a session that holds uncommitted writes, and lands with its commit."""
        write(shop)
        job = shop.enqueue()
        assert not shop.exists(job)
        assert shop.announced == []
        shop.session.commit()
        assert shop.exists(job)
        assert shop.announced == [job.id]

    def test_the_job_goes_with_the_rollback(
        self, shop: Shop, write: Callable[[Shop], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A joined job that is rolled back leaves no row, no signal, and a line at DEBUG."""
        caplog.set_level(logging.DEBUG, "flask_bgjobs")
        write(shop)
        job = shop.enqueue()
        shop.session.rollback()
        assert count_jobs(shop.app) == 0
        assert shop.announced == []
        assert f"Job {job.id} was lost with its transaction" in caplog.text

    def test_a_later_job_is_saved_at_once(self, shop: Shop, write: Callable[[Shop], Any]) -> None:
        """The mark of a write ends with the outermost commit."""
        write(shop)
        shop.session.commit()
        assert shop.exists(shop.enqueue())


def test_a_clean_session_saves_at_once(shop: Shop) -> None:
    """Without uncommitted writes the job is saved at once and announced."""
    job = shop.enqueue()
    assert shop.exists(job)
    assert shop.announced == [job.id]
    shop.session.rollback()
    assert shop.exists(job)


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.session.scalars(sa.select(s.purchase)).all(),
        lambda s: s.session.execute(sa.text("select 1")).all(),
        lambda s: s.session.begin_nested().commit(),
    ],
    ids=["ORM", "text", "an empty savepoint"],
)
def test_a_read_only_session_saves_at_once(shop: Shop, read: Callable[[Shop], Any]) -> None:
    """A session that only read does not hold writes: its job needs no commit."""
    read(shop)
    job = shop.enqueue()
    assert shop.exists(job)
    shop.session.rollback()
    assert shop.exists(job)


def test_an_unmodified_object_is_no_write(shop: Shop) -> None:
    """An object set to the value that it has is not a change."""
    shop.session.add(shop.purchase(name="a"))
    shop.session.commit()
    order = shop.session.scalars(sa.select(shop.purchase)).one()
    order.name = "a"
    assert shop.exists(shop.enqueue())


def test_a_modified_object_is_a_write(shop: Shop) -> None:
    """An unflushed change of a loaded object counts."""
    shop.session.add(shop.purchase(name="a"))
    shop.session.commit()
    shop.session.scalars(sa.select(shop.purchase)).one().name = "b"
    job = shop.enqueue()
    assert not shop.exists(job)


def test_session_none_never_joins(shop: Shop) -> None:
    """With ``session=None`` the job is saved although the session holds writes."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue(session=None)
    assert shop.exists(job)
    shop.session.rollback()
    assert shop.exists(job)


@pytest.mark.on("sqlite")
def test_session_none_does_not_wait_for_its_own_writes(shop: Shop) -> None:
    """On SQLite, saving beside one's own flushed write could only wait: it is refused at once."""
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    with pytest.raises(InvalidJob, match="first, or let the job join"):
        shop.enqueue(session=None)
    shop.session.commit()
    assert shop.exists(shop.enqueue(session=None))


def test_a_given_session_is_always_joined(shop: Shop) -> None:
    """``session=`` joins a session, whether or not it holds writes."""
    with Session(shop.db.engine) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
        assert shop.exists(job)
        lost = shop.enqueue(session=session)
        session.rollback()
        assert not shop.exists(lost)
    assert shop.announced == [job.id]


def test_a_given_scoped_session_is_joined(shop: Shop) -> None:
    """``session=db.session`` joins as well."""
    job = shop.enqueue(session=shop.session)
    assert not shop.exists(job)
    shop.session.commit()
    assert shop.exists(job)


def test_a_session_of_another_database_joins_on_the_tables_bind(shop: Shop, tmp_path: Any) -> None:
    """A given session that is bound elsewhere inserts on the tables' own database."""
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    with Session(other) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
    other.dispose()
    assert shop.exists(job)


def test_a_session_bound_to_a_connection_is_joined(shop: Shop) -> None:
    """A session bound to a connection is joined: a commit of ours would be one of its own."""
    with shop.db.engine.connect() as connection, Session(connection) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
        connection.commit()
    assert shop.exists(job)


def test_a_rolled_back_savepoint_takes_its_job(shop: Shop) -> None:
    """A job enqueued in a savepoint goes with it; one enqueued before it stays."""
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    kept = shop.enqueue()
    nested = shop.session.begin_nested()
    lost = shop.enqueue()
    nested.rollback()
    shop.session.commit()
    assert shop.exists(kept)
    assert not shop.exists(lost)
    assert shop.announced == [kept.id]


def test_a_released_savepoint_announces_at_the_outermost_commit(shop: Shop) -> None:
    """``job_enqueued`` follows the outermost commit and not a savepoint's release."""
    with shop.session.begin_nested():
        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
        job = shop.enqueue()
    assert shop.announced == []
    shop.session.commit()
    assert shop.announced == [job.id]


def test_a_released_savepoint_is_no_commit(shop: Shop) -> None:
    """``wait`` and ``refresh`` of a job that joined in a savepoint raise after its release as
    well, until the outermost commit."""
    with shop.session.begin_nested():
        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
        job = shop.enqueue()
    with pytest.raises(JobNotCommitted):
        job.wait(timeout=1)
    with pytest.raises(JobNotCommitted):
        job.refresh()
    shop.session.commit()
    assert job.refresh().status == "pending"


@pytest.mark.parametrize("end", ["rollback", "remove"])
def test_a_released_savepoint_is_lost_with_its_transaction(shop: Shop, end: str) -> None:
    """A job that joined in a savepoint is gone, and was never announced, when the transaction
    around it is rolled back or closed after the release."""
    # Before the savepoint: Python's driver of SQLite would take its release for a commit.
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    with shop.session.begin_nested():
        job = shop.enqueue()
    getattr(shop.session, end)()
    assert (count_jobs(shop.app), shop.announced) == (0, [])
    assert not job.committed


def test_a_closed_session_loses_its_job(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Closing a session without a commit loses the job, and warns: a commit was forgotten."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    shop.session.remove()
    assert count_jobs(shop.app) == 0
    assert f"Job lost | Job: {job.id} | Class: tests.jobs.echo | " in caplog.text


def test_a_savepoint_that_was_rolled_back_hides_no_lost_job(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """The transaction around it went on, and its commit was forgotten."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    shop.session.begin_nested().rollback()
    shop.session.remove()
    assert f"Job lost | Job: {job.id} | " in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "config"),
    [
        (LookupError("no such customer"), 500, {"PROPAGATE_EXCEPTIONS": False}),
        (LookupError("no such customer"), 500, {"PROPAGATE_EXCEPTIONS": True}),
        (UnprocessableEntity(), 422, {}),
        (KeyError("handled"), 400, {}),
    ],
    ids=str,
)
def test_an_exception_is_no_forgotten_commit(
    shop: Shop, caplog: pytest.LogCaptureFixture, error: Exception, status: int, config: Any
) -> None:
    """A request or a block that raised has lost its job by that."""

    @shop.app.route("/")
    def view() -> str:
        shop.session.add(shop.purchase(name="a"))
        shop.enqueue()
        raise error

    def ask() -> None:
        with contextlib.suppress(LookupError):
            assert shop.app.test_client().get("/").status_code == status

    def work() -> None:
        with Session(shop.db.engine) as session:
            session.add(shop.purchase(name="a"))
            session.flush()
            run_background_job("tests.jobs.echo", session=session)
            raise LookupError

    shop.app.register_error_handler(KeyError, lambda error: ("no", 400))
    shop.app.config.update(config)
    # A request in this thread would share the context, and so the session, of the test.
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    with pytest.raises(LookupError):
        work()
    assert count_jobs(shop.app) == 0
    assert "Job lost" not in caplog.text


def test_a_commit_is_forgotten_also_while_an_exception_is_handled(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """It has nothing to do with the transaction that began meanwhile, the first or a later one."""
    shop.session.add(shop.purchase(name="a"))
    shop.enqueue()
    shop.session.commit()
    try:
        raise OSError
    except OSError:
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.remove()
    assert f"Job lost | Job: {job.id} | " in caplog.text


@pytest.mark.on("sqlite")
def test_changes_do_not_wait_for_ones_own_writes(shop: Shop) -> None:
    """On SQLite a session that has written keeps all others from writing: to wait for it would
    last until the timeout of the database, and then fail."""
    job = shop.enqueue()
    shop.session.commit()
    shop.session.add(shop.purchase(name="a"))
    shop.session.flush()
    for change in (
        job.cancel,
        lambda: retry(state_of(shop.app), [job.id]),
        lambda: delete(state_of(shop.app), [job.id]),
        lambda: pause(state_of(shop.app), "default"),
    ):
        began = time.monotonic()
        with pytest.raises(DatabaseUnusable, match="commit or roll back first"):
            change()
        assert time.monotonic() - began < 4
    assert Job.get(job.id) is not None
    shop.session.commit()
    assert job.cancel().status == "cancelled"


def test_a_job_is_read_by_its_id(shop: Shop) -> None:
    """Outside the session, so that it is as it is now."""
    job = shop.enqueue()
    shop.session.commit()
    found = Job.get(job.id)
    assert found is not None
    assert (found.id, found.target, found.committed) == (job.id, "tests.jobs.echo", True)
    assert Job.get(job.id + 1) is None
    assert [Job.get(number) for number in (0, -(2**70), 2**63, 2**70)] == [None] * 4
    for no_id in (str(job.id), "abc", True, None, 1.5):
        with pytest.raises(TypeError, match="the id of a job is an int, not"):
            Job.get(no_id)  # type: ignore[arg-type]  # what a type checker would refuse


def test_jobs_are_found_by_what_their_attributes_say(shop: Shop) -> None:
    """``name``, ``is_finished`` and ``is_cancelling`` may stand in queries."""
    job = shop.enqueue()
    other = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"])
    shop.session.commit()

    def ids(condition: Any) -> list[int]:
        return list(shop.session.scalars(sa.select(Job.id).where(condition)))

    assert ids(Job.name == "tests.jobs.echo") == [job.id]
    assert ids(Job.name == "tests.jobs.SampleJob.execute") == [other.id]
    assert ids(Job.is_finished) == []
    shop.session.rollback()
    job.cancel()
    assert ids(Job.is_finished) == [job.id]
    assert ids(Job.is_cancelling) == []


def test_joining_flushes(shop: Shop) -> None:
    """Joining flushes first, so that the order has the id that the job is given next."""
    order = shop.purchase(name="a")
    shop.session.add(order)
    shop.enqueue()
    assert order.id is not None


def test_waiting_before_the_commit_raises(shop: Shop) -> None:
    """``wait`` and ``refresh`` of a joined job raise until its transaction committed."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    with pytest.raises(JobNotCommitted, match="has not committed"):
        job.wait(timeout=1)
    with pytest.raises(JobNotCommitted):
        job.refresh()
    shop.session.commit()
    assert job.refresh().status == "pending"


def test_unique_key_does_not_break_the_session(shop: Shop) -> None:
    """A taken ``unique_key`` leaves the joined transaction usable, and gives the holder back."""
    first = shop.enqueue(unique_key="k")
    shop.session.add(shop.purchase(name="a"))
    second = shop.enqueue(unique_key="k")
    assert second.id == first.id
    assert second.deduplicated
    shop.session.commit()
    assert shop.session.scalars(sa.select(shop.purchase.name)).all() == ["a"]
    assert shop.announced == [first.id]


@pytest.mark.on("postgresql", "mysql")
@pytest.mark.parametrize("writes", [False, True])
def test_a_connection_that_dies_is_told_as_it_is(shop: Shop, writes: bool) -> None:
    """The host gets the error of its lost connection, and none of ours instead."""
    with pytest.raises(DBAPIError):
        _lose_connection(shop, writes)


def _lose_connection(shop: Shop, writes: bool) -> None:
    engine = shop.db.engine
    with engine.connect() as connection:
        if writes:
            connection.execute(sa.insert(shop.purchase).values(name="lost"))
        with engine.connect() as other:
            other.exec_driver_sql(END_CONNECTION[engine.name].format(number_of(connection)))
        wait_until(lambda: connection.exec_driver_sql("SELECT 1").scalar() is None, "the end")


def test_in_memory_always_joins() -> None:
    """On in-memory SQLite there is one connection, so that every job joins."""
    shop = Shop("sqlite://")
    with shop.app.app_context():
        lost = shop.enqueue()
        assert not lost.committed
        shop.session.rollback()
        assert shop.enqueue(session=None).committed is False
        shop.session.commit()
        assert count_jobs(shop.app) == 1


@pytest.fixture
def explicit(tmp_path: Any) -> Iterator[Shop]:
    """A shop that begins each transaction by itself, as the documentation of SQLAlchemy advises."""
    shop = Shop(f"sqlite:///{tmp_path / 'shop.db'}")
    with shop.app.app_context():
        engine = shop.db.engine
        sa.event.listen(
            engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
        )
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
        engine.dispose()
        yield shop
        shop.session.remove()
        engine.dispose()
    state_of(shop.app).store.dispose()


@pytest.mark.parametrize(
    "statement",
    ["WITH one AS (SELECT 1) SELECT * FROM one", "PRAGMA user_version", "EXPLAIN SELECT 1"],
)
def test_changes_wait_for_nothing_that_is_not_locked(explicit: Shop, statement: str) -> None:
    """What only looks like a write does not keep a job from being enqueued or cancelled."""
    assert "WAL mode is now on" in str(state_of(explicit.app).store.prepare(wal=True))
    explicit.session.execute(sa.text(statement)).all()
    job = run_background_job("tests.jobs.echo", session=None)
    assert job.cancel().status == "cancelled"


def test_changes_do_not_wait_for_ones_own_reads_without_wal(explicit: Shop) -> None:
    """There a reader keeps all others from committing."""
    job = run_background_job("tests.jobs.echo", session=None)
    explicit.session.execute(sa.text("PRAGMA user_version")).all()
    for change in (job.cancel, lambda: run_background_job("tests.jobs.echo", session=None)):
        with pytest.raises((DatabaseUnusable, InvalidJob), match="open transaction"):
            change()
    explicit.session.rollback()
    assert job.cancel().status == "cancelled"


def test_a_commit_that_failed_leaves_no_transaction_open(
    explicit: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt began a transaction within it, on the same connection."""
    monkeypatch.setattr("flask_bgjobs.store.dialects.sqlite._BUSY_TIMEOUT_MS", 50)
    job = run_background_job("tests.jobs.echo", session=None)
    state_of(explicit.app).store.dispose()
    with explicit.db.engine.connect() as reader:
        reader.execute(sa.text("SELECT * FROM sqlite_master")).all()
        ends = threading.Timer(0.5, reader.rollback)
        ends.start()
        job.cancel()
        ends.join()
    assert stored(explicit.app, job.id).status == "cancelled"


def test_changes_in_memory_commit_nothing_of_the_hosts() -> None:
    """As on a file, a cancel beside uncommitted writes is refused: all share one connection."""
    shop = Shop("sqlite://")
    with shop.app.app_context():
        job = shop.enqueue()
        shop.session.commit()
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        with pytest.raises(DatabaseUnusable, match="commit or roll back first"):
            job.cancel()
        shop.session.rollback()
        assert shop.session.query(shop.purchase).count() == 0
        shop.session.rollback()
        assert job.cancel().status == "cancelled"


def test_writes_on_another_bind_do_not_count(tmp_path: Any) -> None:
    """There is no atomicity across binds: a write elsewhere does not make the job join."""
    shop = Shop(
        f"sqlite:///{tmp_path / 'main.db'}",
        SQLALCHEMY_BINDS={"jobs": f"sqlite:///{tmp_path / 'jobs.db'}"},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        assert shop.exists(job)
        shop.session.rollback()
        assert shop.exists(job)
        with state_of(shop.app).store.read() as connection:
            tables = sa.inspect(connection).get_table_names()
        assert "purchase" not in tables
        assert "bgjobs_job" in tables


def test_a_job_on_a_bind_joins_with_session(tmp_path: Any) -> None:
    """``session=`` joins the session's connection of the tables' own bind."""
    shop = Shop(
        f"sqlite:///{tmp_path / 'main.db'}",
        SQLALCHEMY_BINDS={"jobs": f"sqlite:///{tmp_path / 'jobs.db'}"},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        job = shop.enqueue(session=shop.session)
        assert not shop.exists(job)
        shop.session.commit()
        assert shop.exists(job)


def test_fifteen_threads_that_hold_sessions_never_wait_for_themselves(shop: Shop) -> None:
    """15 threads that each hold a session, some with writes, enqueue without a time-out."""
    together = threading.Barrier(15)
    failures: list[BaseException] = []

    def request(number: int) -> None:
        try:
            with shop.app.app_context():
                shop.session.scalars(sa.select(shop.purchase)).all()
                together.wait(timeout=30)
                for _ in range(10):
                    if number % 3 == 0:
                        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
                    shop.enqueue()
                    if number % 3 == 0:
                        shop.session.commit()
                shop.session.rollback()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=request, args=[n]) for n in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert count_jobs(shop.app) == 150


def test_a_session_at_the_address_of_one_that_is_gone_is_watched() -> None:
    """The writes of each session are seen in a process that makes many apps."""
    engine = sa.create_engine("sqlite://")
    for number in range(100):
        # The one before is gone, and leaves its address to this one.
        sessions = scoped_session(sessionmaker(engine))
        transactions.watch(engine)
        sessions.execute(sa.text("CREATE TABLE IF NOT EXISTS note (id INTEGER)"))
        assert transactions.holds_writes(sessions(), engine), f"session {number}"
        sessions.remove()
        del sessions
    engine.dispose()


def test_a_receiver_that_raises_changes_nothing(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal receiver that raises is logged; commit and job are not affected."""

    def broken(app: Flask, job: Any) -> None:
        raise RuntimeError("receiver")

    with job_enqueued.connected_to(broken, shop.app):
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.commit()
    assert stored(shop.app, job).status == "pending"
    assert "raised; the job is not affected" in caplog.text


def test_the_session_of_the_request_is_not_touched(state: AppState, app: Flask) -> None:
    """Saving at once does not begin a transaction in the host's session."""
    session = state.db.session()
    run_background_job("tests.jobs.echo")
    assert not session.in_transaction()


class _RoutingSession(_HostSession):
    """Reads from a replica and writes to the leader, as in SQLAlchemy's documentation."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **rest: Any) -> Any:
        if rest.get("bind") is not None:
            return rest["bind"]
        is_write = self._flushing or isinstance(clause, sa.Update | sa.Delete)
        return self._db.engines[None if is_write else "replica"]


def _as_replica(url: str) -> str:
    """Another URL of the same database."""
    made = sa.make_url(url)
    option = {"sqlite": {"timeout": "4"}, "postgresql": {"application_name": "replica"}}
    options = option.get(made.get_backend_name(), {"charset": "utf8mb4"})
    return made.update_query_dict(options).render_as_string(hide_password=False)


@pytest.fixture
def routing(database_url: str) -> Iterator[Shop]:
    """A shop whose session reads from a replica."""
    shop = Shop(
        database_url,
        session_class=_RoutingSession,
        SQLALCHEMY_BINDS={"replica": _as_replica(database_url)},
    )
    with shop.app.app_context():
        yield shop
        shop.session.remove()
        state_of(shop.app).store.dispose()
        for engine in shop.db.engines.values():
            engine.dispose()


class TestARoutingSession:
    @pytest.mark.parametrize("flushes", [False, True])
    @pytest.mark.parametrize("explicit", [False, True])
    @pytest.mark.parametrize("commits", [False, True])
    def test_a_job_is_in_the_transaction_of_the_writes(
        self, routing: Shop, flushes: bool, explicit: bool, commits: bool
    ) -> None:
        """Where ``get_bind`` answers a replica outside a flush, a job joins the leader's writes."""
        routing.session.scalars(sa.select(routing.purchase)).all()
        routing.session.rollback()
        routing.session.add(routing.purchase(name="a"))
        if flushes:
            routing.session.flush()
        job = routing.enqueue(**({"session": routing.session} if explicit else {}))
        assert not routing.exists(job)
        (routing.session.commit if commits else routing.session.rollback)()
        assert routing.exists(job) is commits

    def test_without_writes_a_job_is_saved_at_once(self, routing: Shop) -> None:
        """A session that only read from the replica is not joined."""
        routing.session.scalars(sa.select(routing.purchase)).all()
        assert routing.exists(routing.enqueue())

    def test_an_engine_of_its_own_for_the_leader(self, shop: Shop) -> None:
        """Writes through another engine of the same database count as well."""
        leader = sa.create_engine(shop.db.engine.url)
        with Session(leader) as session:
            shop.db.session = scoped_session(lambda: session)
            session.add(shop.purchase(name="a"))
            session.flush()
            job = shop.enqueue()
            assert not shop.exists(job)
            session.rollback()
            assert not shop.exists(job)
        leader.dispose()


FLUSH_EVENTS = ("before_flush", "after_flush", "after_flush_postexec")
MAPPER_EVENTS = ("before_insert", "after_insert", "before_update", "after_update", "after_delete")
JOINS = (*FLUSH_EVENTS, *MAPPER_EVENTS, "before_commit")
"""Events in which there is a transaction that a job can join."""


def _listen_once(shop: Shop, event: str, enqueue: Callable[[], Any]) -> list[Any]:
    """Enqueue a job in an event; it is in the list afterwards."""
    made: list[Any] = []

    def listener(*_: object) -> None:
        if not made:
            made.append(None)
            made[0] = enqueue()

    target = shop.purchase if event in MAPPER_EVENTS else shop.session
    sa.event.listen(target, event, listener)
    return made


def _cause(shop: Shop, event: str) -> None:
    """Leave the session with a change whose commit has the event in it."""
    bought = shop.purchase(name="a")
    shop.session.add(bought)
    if event.endswith(("_update", "_delete")):
        shop.session.commit()
        if event.endswith("_delete"):
            shop.session.delete(bought)
        else:
            bought.name = "b"


class TestEventsOfTheSession:
    @pytest.mark.parametrize("event", JOINS)
    @pytest.mark.parametrize("explicit", [False, True])
    def test_a_job_joins_the_flush(self, shop: Shop, event: str, explicit: bool) -> None:
        """A job that is enqueued in a flush joins its transaction, and the commit succeeds."""
        options = {"session": shop.session} if explicit else {}
        _cause(shop, event)
        made = _listen_once(shop, event, lambda: shop.enqueue(**options))
        shop.session.flush()
        if event != "before_commit":
            assert not made[0].committed
        shop.session.commit()
        (job,) = made
        assert shop.exists(job)
        assert job.committed
        assert shop.announced == [job.id]

    @pytest.mark.parametrize("event", FLUSH_EVENTS + MAPPER_EVENTS)
    def test_a_job_of_a_flush_goes_with_the_rollback(self, shop: Shop, event: str) -> None:
        """A job that was enqueued in a flush is gone after a rollback."""
        _cause(shop, event)
        made = _listen_once(shop, event, shop.enqueue)
        shop.session.flush()
        shop.session.rollback()
        assert not shop.exists(made[0])
        assert shop.announced == []

    @pytest.mark.parametrize("event", ["after_commit", "after_transaction_end"])
    @pytest.mark.parametrize("explicit", [False, True])
    def test_after_the_commit_a_job_is_saved_by_itself(
        self, shop: Shop, event: str, explicit: bool
    ) -> None:
        """In ``after_commit`` there is nothing to join: the job is saved at once."""
        options = {"session": shop.session} if explicit and event == "after_commit" else {}
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        made = _listen_once(shop, event, lambda: shop.enqueue(**options))
        shop.session.commit()
        shop.session.rollback()
        (job,) = made
        if event == "after_commit":
            assert shop.exists(job)
            assert shop.announced == [job.id]

    @pytest.mark.parametrize("flushed", [False, True])
    def test_after_a_rollback_a_job_is_saved_by_itself(self, shop: Shop, flushed: bool) -> None:
        """In ``after_rollback`` the job is saved at once, whatever was left unflushed."""
        shop.session.add(shop.purchase(name="a"))
        if flushed:
            shop.session.flush()
        else:
            shop.session.connection()
        made = _listen_once(shop, "after_rollback", shop.enqueue)
        shop.session.rollback()
        assert shop.exists(made[0])

    def test_a_job_of_a_rolled_back_transaction_is_refused(self, shop: Shop) -> None:
        """``session=`` of a session that was rolled back says what to pass instead."""
        refused: list[BaseException] = []

        def enqueue() -> None:
            with pytest.raises(InvalidJob, match="pass session=None") as caught:
                shop.enqueue(session=shop.session)
            refused.append(caught.value)

        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        _listen_once(shop, "after_rollback", enqueue)
        shop.session.rollback()
        assert refused
        assert count_jobs(shop.app) == 0

    def test_after_a_failed_flush_a_job_is_saved_by_itself(self, shop: Shop) -> None:
        """A flush that fails rolls back; a job about it is saved, and the session goes on."""
        shop.session.add(shop.purchase(id=1, name="a"))
        shop.session.commit()
        shop.session.add(shop.purchase(id=1, name="b"))
        made = _listen_once(shop, "after_rollback", shop.enqueue)
        with pytest.raises(DBAPIError):
            shop.session.flush()
        shop.session.rollback()
        assert shop.exists(made[0])

    @pytest.mark.parametrize("event", ["after_commit", "after_rollback"])
    @pytest.mark.parametrize("commits", [False, True])
    def test_when_a_savepoint_ends_a_job_is_part_of_the_transaction(
        self, shop: Shop, event: str, commits: bool
    ) -> None:
        """At the end of a savepoint a job joins the transaction around it."""
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        nested = shop.session.begin_nested()
        shop.session.add(shop.purchase(name="b"))
        shop.session.flush()
        made = _listen_once(shop, event, shop.enqueue)
        (nested.commit if event == "after_commit" else nested.rollback)()
        (job,) = made
        assert not job.committed
        (shop.session.commit if commits else shop.session.rollback)()
        assert shop.exists(job) is commits
        assert shop.announced == [job.id] * commits

    def test_a_receiver_of_job_enqueued_may_enqueue(self, shop: Shop) -> None:
        """A receiver that enqueues another job after the commit breaks nothing."""
        second: list[Any] = []

        def receiver(_app: Flask, job: Any) -> None:
            if not second:
                second.append(None)
                second[0] = shop.enqueue()

        with job_enqueued.connected_to(receiver, shop.app):
            shop.session.add(shop.purchase(name="a"))
            first = shop.enqueue()
            shop.session.commit()
        shop.session.commit()
        assert shop.exists(first)
        assert shop.exists(second[0])


class TestEventsOfASessionInMemory(TestEventsOfTheSession):
    """The same where there is only one connection."""

    @pytest.fixture
    def shop(self) -> Iterator[Shop]:
        shop = Shop("sqlite://")
        with shop.app.app_context():
            yield shop
            shop.session.remove()
            shop.db.engine.dispose()


@pytest.mark.on("postgresql")
def test_two_binds_of_one_url_may_look_at_two_schemas(empty_database_url: str) -> None:
    """Beside a write on the host's bind, a job goes to the schema that its own bind looks at."""

    def looking_at(schema: str) -> dict[str, Any]:
        return {
            "url": empty_database_url,
            "connect_args": {"options": f"-csearch_path={schema}"},
        }

    engine = sa.create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA jobs")
    shop = Shop(
        empty_database_url,
        SQLALCHEMY_BINDS={"jobs": looking_at("jobs")},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        shop.session.commit()
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT id FROM jobs.bgjobs_job").scalars().all()
        assert found == [job.id]
        for each in (engine, *shop.db.engines.values()):
            each.dispose()
    state_of(shop.app).store.dispose()


@pytest.mark.on("postgresql")
def test_two_binds_of_one_url_may_differ_in_other_ways(empty_database_url: str) -> None:
    """Options that do not decide where a table is found make no other database: a job still joins
    the transaction of the host's bind."""
    bind = {
        "url": empty_database_url,
        "connect_args": {"options": "-c statement_timeout=60000"},
    }
    with pytest.warns(UserWarning, match="would drop the tables"):
        shop = Shop(empty_database_url, SQLALCHEMY_BINDS={"jobs": bind}, BGJOBS_BIND_KEY="jobs")
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.rollback()
        assert not shop.exists(job)
        for each in shop.db.engines.values():
            each.dispose()
    state_of(shop.app).store.dispose()


def test_two_binds_in_memory_are_two_databases() -> None:
    """Beside a write on the host's bind, a job goes to the bind that has its tables."""
    shop = Shop("sqlite://", SQLALCHEMY_BINDS={"jobs": "sqlite://"}, BGJOBS_BIND_KEY="jobs")
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        shop.session.commit()
        assert shop.exists(job)
        for engine in shop.db.engines.values():
            engine.dispose()
    state_of(shop.app).store.dispose()
