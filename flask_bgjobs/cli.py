"""``flask bgjobs …``: each command parses, calls one function and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError, OperationalError

from . import actions, serialize
from .app_state import AppState, current_state, import_jobs
from .config import check_queue
from .enqueue import run_background_job
from .errors import BgJobsError, JobNotFound
from .states import JobStatus
from .store import ActionResult
from .text import one_line
from .version import __version__

if TYPE_CHECKING:
    from .dashboard.queries import JobRow

P = ParamSpec("P")
R = TypeVar("R")

bgjobs_commands = AppGroup("bgjobs", help="Background jobs: run a worker, see and change jobs.")

_COLUMN_WIDTH = 60
_MAX_ID = 2**63 - 1
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_ids_argument = click.argument("ids", nargs=-1, required=True, type=click.IntRange(1, _MAX_ID))


def _one_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what goes wrong into one sentence and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BgJobsError as error:
            raise click.ClickException(one_line(str(error))) from None
        except DBAPIError as error:
            raise click.ClickException(one_line(_database_sentence(error))) from None

    return wrapped


def _database_sentence(error: DBAPIError) -> str:
    text = str(error.orig)
    if isinstance(error, OperationalError) and "no such table" in text:
        return f"{text}: run `flask db upgrade`, or `flask bgjobs init-db` without Flask-Migrate"
    return f"the database refused: {text}"


class _Queues(click.ParamType[Any]):
    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return [check_queue(name.strip()) for name in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


@bgjobs_commands.command("worker")
@click.option(
    "-q", "--queues", type=_Queues(), help="Serve only these, in strict order: high,mail."
)
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Jobs at once.")
@click.option("--burst", is_flag=True, help="Stop when nothing is pending or running.")
@click.option("--max-jobs", type=click.IntRange(min=1), help="Stop after so many jobs.")
@click.option("--max-time", type=click.FloatRange(min=0, min_open=True), help="Stop after seconds.")
@click.option("-n", "--name", help="Name shown on the dashboard; default: host and pid.")
@click.option("--shutdown-timeout", type=click.FloatRange(min=0), help="Grace of a stop, seconds.")
@_one_sentence
def worker_command(**options: Any) -> None:
    """Run jobs until told to stop (SIGTERM or Ctrl-C; a second one stops at once)."""
    from .worker import Worker, WorkerOptions

    state = current_state()
    _show_logs()
    worker = Worker(state, WorkerOptions(**options))
    for line in _banner(state, worker):
        click.echo(line)
    with _stopped_by_signals(worker.stop):
        worker.run()
    counts = ", ".join(f"{count} {status.value}" for status, count in worker.counts.items())
    click.echo(f"Worker {worker.name} stopped: {counts or 'it ran no job'}")
    if worker.has_code_running or _other_threads_hold_the_process():
        # Python would wait for them at its end, while their jobs run elsewhere already.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _other_threads_hold_the_process() -> bool:
    main = threading.main_thread()
    return any(t is not main and not t.daemon for t in threading.enumerate())


def _banner(state: AppState, worker: Any) -> list[str]:
    queues = ", ".join(worker.queues) if worker.queues else "all, by priority"
    url = state.store.host_engine.url.render_as_string(hide_password=True)
    return [
        f"flask-bgjobs {__version__} worker {worker.name} for the app {state.app.name}",
        f"  database {url}, queues: {queues}",
        f"  threads: {worker.concurrency}, names on the allow-list: {len(state.registry)}",
    ]


def _show_logs() -> None:
    """Print the stages of jobs, unless the host has set logging up by itself."""
    logger = logging.getLogger("flask_bgjobs")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Any:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@bgjobs_commands.command("enqueue")
@click.argument("target")
@click.argument("method", required=False)
@click.option("-p", "--parameters", default="[]", help="JSON: a list or an object of parameters.")
@click.option("--queue", help="Name of the queue.")
@click.option("--priority", help="A number, higher runs first, or a name.")
@click.option("--delay", type=float, help="Seconds to wait before the first attempt.")
@click.option("--retries", type=int, help="Retries after the first attempt.")
@click.option("--retry-delay", type=float, help="Seconds before each retry.")
@click.option("--timeout", type=float, help="Seconds that one attempt may take.")
@click.option("--unique-key", help="Enqueue only if no unfinished job has this key.")
@_json_option
@_one_sentence
def enqueue_command(
    target: str,
    method: str | None,
    parameters: str,
    priority: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Enqueue TARGET (a class or function on the allow-list), of a class with its METHOD."""
    import_jobs(current_state())
    job = run_background_job(
        target,
        method,
        _parsed(parameters),
        priority=_priority(priority),
        session=None,
        **options,
    )
    if as_json:
        _print_json({"id": job.id, "status": job.status, "deduplicated": job.deduplicated})
    else:
        known = "is already enqueued" if job.deduplicated else f"enqueued, {job.status}"
        click.echo(f"Job {job.id} {known}: {job.name}")


def _parsed(parameters: str) -> Any:
    try:
        return json.loads(parameters)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--parameters") from None


def _priority(text: str | None) -> int | str | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


@bgjobs_commands.command("list")
@click.option("--status", type=click.Choice([s.value for s in JobStatus]), multiple=True)
@click.option("--queue", multiple=True, help="Only this queue; may be repeated.")
@click.option("--search", default="", help="Text in name, error, tags or key; or an id.")
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True)
@_json_option
@_one_sentence
def list_command(
    status: Sequence[str], queue: Sequence[str], search: str, limit: int, as_json: bool
) -> None:
    """List jobs, newest first."""
    from .dashboard.queries import JobFilters, list_jobs

    import_jobs(current_state())
    filters = JobFilters(statuses=tuple(status), queues=tuple(queue), q=search)
    rows = list_jobs(current_state(), filters, per=limit).jobs
    if as_json:
        _print_json([_job_data(row) for row in rows])
    else:
        _print_table(rows)


@bgjobs_commands.command("show")
@click.argument("job_id", type=click.IntRange(1, _MAX_ID))
@_json_option
@_one_sentence
def show_command(job_id: int, as_json: bool) -> None:
    """Show one job: its fields, its log, and the attempts that did not complete."""
    from .dashboard.queries import job_detail

    state = current_state()
    import_jobs(state)
    job = state.store.get(job_id)
    if job is None:
        raise JobNotFound(f"job {job_id} does not exist")
    detail = job_detail(state, job)
    data = _job_data(detail.row) | {
        "parameters": _read_json(detail.parameters),
        "result": _read_json(detail.result),
        "meta": _read_json(detail.meta),
        "worker": detail.worker_name,
        "why_not_running": detail.reasons,
        "attempts": [_plain(dataclasses.asdict(attempt)) for attempt in detail.attempts],
        "log": [_plain(dataclasses.asdict(line)) for line in detail.lines],
    }
    if as_json:
        _print_json(data)
    else:
        _print_job(data)


@bgjobs_commands.command("retry")
@_ids_argument
@_one_sentence
def retry_command(ids: Sequence[int]) -> None:
    """Run failed, cancelled or retrying jobs again, with all their retries."""
    _report("pending again", actions.retry(current_state(), ids))


@bgjobs_commands.command("cancel")
@_ids_argument
@_one_sentence
def cancel_command(ids: Sequence[int]) -> None:
    """Cancel jobs; running ones are asked to stop."""
    _report("cancelled", actions.cancel(current_state(), ids))


@bgjobs_commands.command("delete")
@_ids_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@_one_sentence
def delete_command(ids: Sequence[int], yes: bool) -> None:
    """Delete jobs that do not run, for ever."""
    if not yes:
        click.confirm(f"Delete {len(ids)} job(s) for ever?", abort=True)
    _report("deleted", actions.delete(current_state(), ids))


@bgjobs_commands.command("init-db")
@_one_sentence
def init_db_command() -> None:
    """Create the tables, for apps without Flask-Migrate."""
    from . import schema

    state = current_state()
    created = schema.create_tables(state)
    notice = state.store.prepare(wal=state.config.sqlite_wal)
    click.echo(f"Created {', '.join(created)}" if created else "All tables are already there")
    if notice:
        click.echo(notice)


@bgjobs_commands.command("check")
@_one_sentence
def check_command() -> None:
    """Compare the database with the models; exit code 1 when they differ."""
    from . import schema

    found = schema.differences(current_state())
    for sentence in found:
        click.echo(sentence)
    if found:
        raise click.ClickException(
            f"{len(found)} difference(s); run `flask db migrate` and `flask db upgrade` (without "
            "Flask-Migrate, `flask bgjobs init-db` makes missing tables)"
        )
    click.echo("The database matches the models")


def _report(done: str, result: ActionResult) -> None:
    for job_id in result.done:
        click.echo(f"Job {job_id} {done}")
    for job_id in result.requested:
        click.echo(f"Job {job_id} is running and was asked to stop")
    for job_id, reason in result.skipped.items():
        click.echo(f"Job {job_id} skipped: {reason}", err=True)
    if not result.done and not result.requested:
        sys.exit(1)


def _job_data(row: JobRow) -> dict[str, Any]:
    """A job as ``--json`` prints it; its secrets are masked already."""
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del fields["job"]
    return _plain(fields) | {"parameters": _read_json(row.parameters)}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _time(v) if isinstance(v, dt.datetime) else v for name, v in fields.items()}


def _time(value: dt.datetime) -> str:
    return f"{value.isoformat(timespec='milliseconds')}Z"


def _read_json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def _print_job(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name not in ("attempts", "log") and value not in (None, [], ()):
            text = value if isinstance(value, str) else serialize.dumps_plain(value)
            click.echo(f"{name:>15}  {one_line(text)}")
    for line in data["log"]:
        click.echo(f"{line['created_at']}  {one_line(line['message'])}")
    for attempt in data["attempts"]:
        error = one_line(attempt["error"] or "")
        click.echo(f"\nAttempt {attempt['attempt']} {attempt['outcome']}: {error}")
        click.echo(attempt["traceback"] or "")


def _print_json(data: Any) -> None:
    click.echo(json.dumps(json.loads(serialize.dumps_plain(data)), indent=2, ensure_ascii=False))


def _print_table(jobs: Sequence[JobRow]) -> None:
    if not jobs:
        click.echo("No jobs")
        return
    rows = [["ID", "STATUS", "QUEUE", "PRIORITY", "RETRIES", "JOB", "ERROR"]]
    for job in jobs:
        retries = f"{job.retry_count}/{job.retries}"
        cells = [job.id, job.state, job.queue, job.priority, retries, job.name, job.error or ""]
        rows.append([one_line(str(cell))[:_COLUMN_WIDTH] for cell in cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())
