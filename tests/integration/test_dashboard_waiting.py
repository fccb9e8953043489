"""Waiting jobs on the dashboard, in the API, and on the command line."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
from flask import Flask

from tests.integration.test_dashboard_support import PREFIX, Host, MakeHost, listed_ids, now
from tests.integration.test_dashboard_support import host_maker as host_maker

NEW = "shop.jobs.new"
WARNING = "Jobs wait for code that their workers do not have"


def add_waiting(host: Host, count: int = 1, name: str = NEW, **values: Any) -> int:
    """Add jobs that wait for code, and return the id of the last."""
    target, _, method = name.partition(":")
    waits = {
        "status": "waiting",
        "waits_for": "code",
        "waiting_on": name,
        "waiting_since": now() - dt.timedelta(hours=1),
    }
    return host.add(count, target=target, method=method or None, attempt=1, **waits | values)


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    host = make_host()
    host.add_worker()
    return host


class TestPages:
    def test_overview_names_what_waits_for_code(self, host: Host) -> None:
        """The overview counts waiting jobs, and names the first three jobs that wait for code."""
        assert WARNING not in host.get("/")
        add_waiting(host, 2)
        for name in ("shop.jobs.b:run", "shop.jobs.c", "shop.jobs.d"):
            add_waiting(host, name=name, queue="mail")
        page = host.get("/")
        assert WARNING in page
        assert f'<a href="{PREFIX}/list?job=shop.jobs.b.run&amp;status=waiting">' in page
        assert " and 1 more" in page
        assert '<span class="bgj-number">5</span> <span class="bgj-status bgj-waiting">' in page

    @pytest.mark.parametrize("path", ["/list", "/queues", "/workers"])
    def test_other_pages_name_it_too(self, host: Host, path: str) -> None:
        """The list, the queues and the workers have the same warning."""
        add_waiting(host)
        assert f"{WARNING}: <a " in host.get(path)

    def test_list_shows_waiting_jobs(self, host: Host) -> None:
        """Waiting jobs can be listed and filtered by name."""
        waiting = add_waiting(host)
        add_waiting(host, name="shop.jobs.other")
        host.add(2)
        assert listed_ids(host.get(f"/list?status=waiting&job={NEW}")) == [waiting]

    def test_queue_shows_its_waiting_jobs(self, host: Host) -> None:
        """The page of queues has a column of waiting jobs."""
        add_waiting(host, 7, queue="mail")
        assert '<td role="cell" data-label="Waiting" class="bgj-num">7</td>' in host.get("/queues")

    def test_job_explains_why_it_waits(self, host: Host) -> None:
        """A waiting job says which code it waits for, until when, and how many others do."""
        add_waiting(host, 2)
        job_id = add_waiting(host, waiting_since=dt.datetime(2026, 11, 1, 10))
        page = host.get(f"/job/{job_id}")
        assert "<dt>Waits for</dt><dd>code</dd>" in page
        assert f"It waits for code: the worker that claimed it does not have {NEW}." in page
        assert "serves the queue default by 2026-11-02 10:00:00 UTC, it fails (BGJOBS_UNK" in page
        assert "2 other jobs of the queue default wait for the same code." in page
        assert "It is due" not in page

    def test_job_that_is_refused_next(self, make_host: MakeHost) -> None:
        """With ``BGJOBS_UNKNOWN_JOBS = "fail"`` no time is named, because none applies."""
        host = make_host(BGJOBS_UNKNOWN_JOBS="fail")
        page = host.get(f"/job/{add_waiting(host)}")
        assert "The next worker without this code refuses it" in page
        assert "BGJOBS_UNKNOWN_TIMEOUT" not in page

    def test_job_with_other_obstacles(self, make_host: MakeHost) -> None:
        """A paused queue and a missing worker are named as well."""
        host = make_host()
        host.pause("default")
        page = host.get(f"/job/{add_waiting(host)}")
        assert "The queue default is paused." in page
        assert "No live worker serves the queue default." in page

    @pytest.mark.parametrize("waits_for", [None, "nonsense"])
    def test_edited_row_is_explained(self, host: Host, waits_for: str | None) -> None:
        """A row that waits for something unknown says what to do."""
        page = host.get(f"/job/{add_waiting(host, waits_for=waits_for)}")
        assert f"it waits for {waits_for or 'nothing'}, which no worker handles" in page

    def test_visitor_who_may_see_some_jobs(self, make_host: MakeHost) -> None:
        """The names and numbers of all jobs are not shown to a visitor who may see some."""
        host = make_host(authorizer=lambda action, job: job is None or job.owner == "42")
        add_waiting(host, 2)
        own = add_waiting(host, owner="42")
        assert WARNING not in host.get("/")
        page = host.get(f"/job/{own}")
        assert "It waits for code" in page
        assert "other job" not in page
        assert json.loads(host.get("/api/v1/stats"))["waiting_for_code"] is None


class TestData:
    def test_api(self, host: Host) -> None:
        """The API has the status, what a job waits for, and the names of what waits for code."""
        job_id = add_waiting(host)
        add_waiting(host, queue="mail")
        stats = json.loads(host.get("/api/v1/stats"))
        assert (stats["jobs"]["waiting"], stats["waiting_for_code"]) == (2, [NEW])
        job = json.loads(host.get(f"/api/v1/jobs/{job_id}"))
        assert (job["status"], job["waits_for"]) == ("waiting", "code")
        queues = json.loads(host.get("/api/v1/queues"))["queues"]
        assert {queue["name"]: queue["waiting"] for queue in queues} == {"default": 1, "mail": 1}
        (row,) = json.loads(host.get("/api/v1/jobs?status=waiting&queue=mail"))["jobs"]
        assert row["waits_for"] == "code"

    def test_other_jobs_wait_for_nothing(self, host: Host) -> None:
        """The values of an earlier wait are not shown."""
        job_id = add_waiting(host, status="completed")
        assert json.loads(host.get(f"/api/v1/jobs/{job_id}"))["waits_for"] is None
        assert "Waits for" not in host.get(f"/job/{job_id}")

    def test_commands(self, host: Host) -> None:
        """``stats``, ``queues``, ``list``, ``show`` and ``health`` show waiting jobs."""
        job_id = add_waiting(host, 3, name="shop.jobs.Report:archive")
        assert "waiting    3" in command(host.app, "stats")
        assert command(host.app, "queues").splitlines()[0].split()[:4] == [
            *("QUEUE", "PENDING", "SCHEDULED", "WAITING"),
        ]
        assert "waiting" in command(host.app, "list", "--status", "waiting")
        assert "waits_for  code" in command(host.app, "show", str(job_id))
        health = command(host.app, "health")
        assert health == (
            "Healthy: 1 worker alive; jobs wait for code that their workers do not have: "
            "shop.jobs.Report.archive\n"
        )
        data = json.loads(command(host.app, "health", "--json"))
        assert (data["healthy"], data["waiting_for_code"]) == (True, ["shop.jobs.Report.archive"])
        assert command(host.app, "cancel", "--status", "waiting", "--yes").startswith("3 ")


def command(app: Flask, *words: str) -> str:
    """The output of ``flask bgjobs …``."""
    result = app.test_cli_runner().invoke(args=["bgjobs", *words])
    assert result.exit_code == 0, result.output
    return result.output
