"""Lists of jobs: each filter and order gives the same result as filtering all rows in Python."""

from __future__ import annotations

import datetime as dt
import json
import random
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.job.statuses import FINAL, JobStatus
from flask_bgjobs.operations.queries import (
    ORDERS,
    InvalidCursor,
    InvalidSearch,
    JobFilters,
    list_jobs,
    listing,
)
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Store

START = dt.datetime(2026, 1, 1, 12)
_FINAL = {status.value for status in FINAL}


def _add(store: Store, number: int, seed: int = 3) -> None:
    """Add jobs of all statuses in several queues, created one second apart; some share other
    times."""
    template = run_background_job("tests.jobs.echo", parameters=["x"])
    chance = random.Random(seed)
    columns = {c.name: c for c in Job.__table__.c if c.name != "id"}
    with store.read() as connection:
        row = connection.execute(sa.select(*columns.values()).where(Job.id == template.id)).one()
    store.delete([template.id])
    rows = []
    for index in range(number):
        status = chance.choice(list(JobStatus)).value
        moment = START + dt.timedelta(seconds=index)
        changes = {
            "status": status,
            "queue": chance.choice(["default", "mail", "reports"]),
            "created_at": moment,
            "run_at": START + dt.timedelta(minutes=chance.randrange(5)),
            "finished_at": START + dt.timedelta(hours=chance.randrange(5))
            if status in _FINAL
            else None,
            "owner": chance.choice([None, "anna", "bert"]),
            "tags": chance.choice([None, '["a"]', '["a","b"]', '["A","bb"]']),
            "error_type": chance.choice([None, "ValueError", "valueerror"]),
            "claimed_at": chance.choice([None, moment + dt.timedelta(minutes=2)]),
        }
        rows.append({**row._mapping, **changes})
    store.transaction(lambda connection: connection.execute(sa.insert(Job.__table__), rows))


def _all_rows(store: Store) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(sa.select(Job.__table__)))


def _pages(state: AppState, filters: JobFilters, per: int) -> list[int]:
    """The ids on all pages, read to the end and back. Both directions must give the same pages."""
    down: list[list[int]] = []
    after = None
    while True:
        page = list_jobs(state, filters, per=per, after=after)
        down.append([row.id for row in page.jobs])
        if page.older is None:
            break
        after = page.older
    up = [down[-1]]
    while page.newer is not None:
        page = list_jobs(state, filters, per=per, before=page.newer)
        up.append([row.id for row in page.jobs])
    assert [each for each in up[::-1] if each] == [each for each in down if each]
    return [job_id for each in down for job_id in each]


def _expected(rows: list[Any], filters: JobFilters) -> list[int]:
    key = {"created": "id", "finished": "finished_at", "due": "run_at"}[filters.sort.lstrip("-")]
    wanted = [
        row
        for row in rows
        if (not filters.statuses or row.status in filters.statuses)
        and JobStatus(row.status) in filters.order.statuses
        and (not filters.queues or row.queue in filters.queues)
        and (not filters.owner or row.owner == filters.owner)
        and (not filters.tag or filters.tag in json.loads(row.tags or "[]"))
        and (filters.error in ("", row.error_type))
        and (filters.since is None or _last_event(row) >= filters.since)
        and (filters.until is None or _last_event(row) <= filters.until)
    ]
    wanted.sort(key=lambda row: (getattr(row, key), row.id), reverse=filters.sort.startswith("-"))
    return [row.id for row in wanted]


def _last_event(row: Any) -> dt.datetime:
    last: dt.datetime = row.finished_at or row.claimed_at or row.created_at
    return last


@pytest.mark.parametrize("sort", ORDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statuses": ("failed",)},
        {"statuses": ("failed", "completed", "scheduled")},
        {"queues": ("mail",)},
        {"statuses": ("retrying", "scheduled"), "queues": ("mail", "default")},
        {"owner": "anna", "tag": "b"},
        {"error": "ValueError"},
        {"since": START + dt.timedelta(seconds=40), "until": START + dt.timedelta(hours=3)},
        {"until": START + dt.timedelta(seconds=130)},
    ],
    ids=[
        "all",
        "one status",
        "statuses",
        "queue",
        "both",
        "owner and tag",
        "error",
        "since",
        "until",
    ],
)
def test_every_filter_in_every_order(
    app: Flask, state: AppState, store: Store, sort: str, changes: dict[str, Any]
) -> None:
    """All pages together contain the jobs that match the filters, in the right order, in both
    directions."""
    _add(store, 150)
    filters = JobFilters(sort=sort, **changes)
    expected = _expected(_all_rows(store), filters)
    assert _pages(state, filters, 7) == expected
    assert _pages(state, filters, 200) == expected


def test_slow_database_still_fills_pages(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a search exceeds its time because the database is slow, the page still contains the jobs
    that were found."""
    _add(store, 60)
    filters = JobFilters(sort="-due")
    expected = _expected(_all_rows(store), filters)
    monkeypatch.setattr(listing, "_SEARCH_SECONDS", -1.0)
    assert _pages(state, filters, 7) == expected
    page = list_jobs(state, filters, per=7)
    assert (len(page.jobs), page.timed_out) == (7, False)


def test_slow_search_continues_on_next_page(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that exceeds its time returns the jobs found so far, and the next page continues
    from there."""
    _add(store, 60)
    monkeypatch.setattr(listing, "_SEARCH_SECONDS", -1.0)
    found: list[int] = []
    after = None
    cuts = 0
    while True:
        page = list_jobs(state, per=7, after=after, visible=lambda job: job.queue == "mail")
        found += [row.id for row in page.jobs]
        cuts += page.timed_out
        if page.older is None:
            break
        after = page.older
    assert found == _expected(_all_rows(store), JobFilters(queues=("mail",)))
    assert cuts > 0


def test_jobs_with_equal_times_are_paged(app: Flask, state: AppState, store: Store) -> None:
    """Jobs that finished in the same microsecond appear on exactly one page each."""
    _add(store, 40)
    moment = START.replace(microsecond=123_456)
    change = sa.update(Job).values(status="completed", finished_at=moment)
    store.transaction(lambda connection: connection.execute(change))
    for sort in ("finished", "-finished"):
        filters = JobFilters(sort=sort)
        assert _pages(state, filters, 3) == _expected(_all_rows(store), filters)


@pytest.mark.parametrize("sort", ["-created", "created", "-finished"])
def test_search_reads_limited_rows_per_page(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch, sort: str
) -> None:
    """A filter without an index searches a limited number of rows per page; the next page continues
    the search."""
    monkeypatch.setattr(listing, "SEARCHED_ROWS", 10)
    _add(store, 120)
    filters = JobFilters(sort=sort, queues=("mail",), statuses=("completed", "failed"))
    first = list_jobs(state, filters, per=50)
    expected = _expected(_all_rows(store), filters)
    assert first.may_find_more
    assert [row.id for row in first.jobs] == expected[: len(first.jobs)]
    assert len(first.jobs) < len(expected)
    found = [row.id for row in first.jobs]
    page = first
    while page.older is not None:
        page = list_jobs(state, filters, per=50, after=page.older)
        found += [row.id for row in page.jobs]
    assert found == expected


def test_job_id_is_found_beyond_the_search_limit(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search for an id finds it beyond the limit of searched rows, and continues from that
    limit."""
    monkeypatch.setattr(listing, "SEARCHED_ROWS", 3)
    _add(store, 10)
    ids = sorted(row.id for row in _all_rows(store))
    page = list_jobs(state, JobFilters(q=f"{ids[0]},{ids[1]}"), per=1)
    assert [row.id for row in page.jobs] == [ids[1]]
    found = {ids[1]}
    while page.older is not None:
        page = list_jobs(state, JobFilters(q=f"{ids[0]},{ids[1]}"), per=1, after=page.older)
        found |= {row.id for row in page.jobs}
    assert found == {ids[0], ids[1]}


class TestSearch:
    @pytest.fixture
    def ids(self, app: Flask, state: AppState) -> dict[str, int]:
        """Jobs with searchable values, by a short name."""
        jobs = {
            "order": run_background_job(
                "tests.jobs.echo",
                parameters={"value": {"order": {"id": 7, "ok": True, "at": START}}},
            ),
            "secret": run_background_job("tests.jobs.login", parameters=["x", "hunter2"]),
            "mail": run_background_job(
                "tests.jobs.echo", parameters=["Grüße"], queue="mail", tags=["vip", "a b"]
            ),
            "owned": run_background_job(
                "tests.jobs.echo", parameters=["x"], owner="anna", unique_key="100%_x"
            ),
        }
        failed = run_background_job("tests.jobs.echo", parameters=["y"])
        change = (
            sa.update(Job)
            .where(Job.id == failed.id)
            .values(status="failed", error="Timeout: it timed out", worker_id=12)
        )
        state.store.transaction(lambda connection: connection.execute(change))
        return {**{name: job.id for name, job in jobs.items()}, "failed": failed.id}

    @pytest.mark.parametrize(
        ("q", "names"),
        [
            ("parameters.value.order.id:7", {"order"}),
            ("parameters.value.order.ok:true", {"order"}),
            ("parameters.value.order.id:8", set()),
            ('parameters.value.order.at:"2026-01-01T12:00:00"', {"order"}),
            ("2026-01-01t12:00", {"order"}),
            ("parameters.value.order:7", set()),
            ("parameters.0:Grüße", {"mail"}),
            ("parameters.0:Grüße,y", {"mail", "failed"}),
            ("parameters.1:hunter2", set()),
            ("parameters.1:***", set()),
            ("hunter2", set()),
            ("grüße", {"mail"}),
            ("queue:mail", {"mail"}),
            ("queue:MAIL", {"mail"}),
            ("queue:mail,nope", {"mail"}),
            ('tag:vip tag:"a b"', {"mail"}),
            ("tag:vi", set()),
            ("owner:anna", {"owned"}),
            ("owner:ann", set()),
            ("100%_x", {"owned"}),
            ('error:"timed OUT"', {"failed"}),
            ("error:timed job:echo", {"failed"}),
            ("error:timed job:login", set()),
            ("worker:12", {"failed"}),
            ("worker:nobody", set()),
            ("job:tests.jobs.echo", {"order", "mail", "owned", "failed"}),
            ("job:login", {"secret"}),
        ],
    )
    def test_search_fields(
        self, state: AppState, ids: dict[str, int], q: str, names: set[str]
    ) -> None:
        """Each search term finds the jobs with that value, and no term finds a masked value."""
        found = {row.id for row in list_jobs(state, JobFilters(q=q)).jobs}
        assert found == {ids[name] for name in names}

    def test_search_by_id(self, state: AppState, ids: dict[str, int]) -> None:
        """A search by id finds the job, with and without the prefix ``id:``."""
        order, secret = ids["order"], ids["secret"]
        for q in (f"id:{order}", f"#{order}", f"id:#{order},{order}"):
            assert order in {row.id for row in list_jobs(state, JobFilters(q=q)).jobs}
        both = list_jobs(state, JobFilters(q=f"id:{order}..{secret}")).jobs
        assert {row.id for row in both} == {order, secret}
        assert list_jobs(state, JobFilters(q="id:9223372036854775807")).jobs == []

    def test_job_filter_matches_whole_name(self, state: AppState, ids: dict[str, int]) -> None:
        """The ``job`` filter matches only the whole name."""
        assert len(list_jobs(state, JobFilters(job="tests.jobs.echo")).jobs) == 4
        assert list_jobs(state, JobFilters(job="tests.jobs")).jobs == []


@pytest.mark.parametrize("sort", ["-created", "-finished"])
@pytest.mark.parametrize("cursor", ["", "x", "eDox", "é", "a" * 500, "OTk5" * 7])
def test_invalid_cursor_is_refused(app: Flask, state: AppState, cursor: str, sort: str) -> None:
    """An invalid cursor is refused."""
    with pytest.raises(InvalidCursor):
        list_jobs(state, JobFilters(sort=sort), after=cursor)


def test_cursor_of_another_order_is_refused(app: Flask, state: AppState, store: Store) -> None:
    """A cursor of a list in another order is refused."""
    _add(store, 40)
    for mine, other in (("-created", "finished"), ("-finished", "created")):
        older = list_jobs(state, JobFilters(sort=mine), per=3).older
        with pytest.raises(InvalidCursor):
            list_jobs(state, JobFilters(sort=other), after=older)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"statuses": ("nope",)}, ValueError),
        ({"sort": "name"}, ValueError),
        ({"q": "colour:red"}, InvalidSearch),
    ],
)
def test_invalid_filters_are_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    """An unknown status, order or search field is refused at once."""
    with pytest.raises(error):
        JobFilters(**changes)
