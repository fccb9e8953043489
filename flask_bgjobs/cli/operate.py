"""Commands for operators: ``stats``, ``queues``, ``workers``, ``prune``, ``health`` and others."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy.exc import SQLAlchemyError

from ..config import Config
from ..job import durations
from ..job.plain import plain, time_text
from ..job.statuses import FINAL, JobStatus
from ..operations import actions
from ..state import AppState, current_state, import_jobs
from ..store import database_sentence
from .group import Duration, bgjobs_commands, json_option, one_sentence, yes_option
from .output import counted, print_json, print_table, progress_bar
from .user import this_user

if TYPE_CHECKING:
    from ..operations.queries import QueueStats, Stats, WorkerDetail

_FINISHED = [status for status in JobStatus if status in FINAL]


@bgjobs_commands.command("stats")
@json_option
@one_sentence
def stats_command(as_json: bool) -> None:
    """Count the jobs by status and by queue, and the workers."""
    from ..operations.queries import stats_now

    stats = stats_now(current_state())
    if as_json:
        print_json({"now": time_text(stats.now), **_stats_data(stats)})
    else:
        _print_stats(stats)


def _stats_data(stats: Stats) -> dict[str, Any]:
    return {
        "jobs": stats.jobs,
        "queues": [
            {
                "name": queue.name,
                "queued": queue.queued,
                "running": queue.running,
                "oldest_pending_seconds": queue.oldest_pending_seconds,
            }
            for queue in stats.queues
        ],
        "last_hour": {
            "completed": stats.completed_last_hour,
            "failed": stats.failed_last_hour,
        },
        "workers": {"alive": stats.alive, "silent": stats.silent},
    }


def _print_stats(stats: Stats) -> None:
    print_table(["STATUS", "JOBS"], [(name, f"{n:,}") for name, n in stats.jobs.items()])
    if stats.queues:
        click.echo()
        print_table(
            ["QUEUE", "QUEUED", "RUNNING", "OLDEST PENDING"],
            [(q.name, f"{q.queued:,}", f"{q.running:,}", _oldest(q)) for q in stats.queues],
        )
    click.echo(
        f"\nLast hour: {stats.completed_last_hour:,} completed, {stats.failed_last_hour:,} failed"
    )
    click.echo(f"Workers: {stats.alive:,} alive, {stats.silent:,} silent")


def _oldest(queue: QueueStats) -> str:
    seconds = queue.oldest_pending_seconds
    return "" if seconds is None else durations.in_words(seconds)


@bgjobs_commands.command("queues")
@json_option
@one_sentence
def queues_command(as_json: bool) -> None:
    """Show how many jobs each queue holds, and how many workers serve it."""
    from ..operations.queries import queue_stats

    queues = queue_stats(current_state())
    if as_json:
        print_json([plain(queue) for queue in queues])
    elif queues:
        print_table(
            ["QUEUE", "PENDING", "SCHEDULED", "WAITING", "RETRYING", "RUNNING", "OLDEST PENDING",
             "WORKERS", "PAUSED SINCE"],
            [
                (q.name, f"{q.pending:,}", f"{q.scheduled:,}", f"{q.waiting:,}", f"{q.retrying:,}",
                 f"{q.running:,}", _oldest(q), q.workers,
                 "" if q.paused_at is None else time_text(q.paused_at))
                for q in queues
            ],
        )  # fmt: skip
    else:
        click.echo("No queues yet")


@bgjobs_commands.command("pause")
@click.argument("names", nargs=-1, required=True)
@one_sentence
def pause_command(names: Sequence[str]) -> None:
    """Stop workers from claiming jobs of these queues; running jobs continue."""
    for name in names:
        changed = actions.pause(current_state(), name, this_user())
        click.echo(f"Queue {name} {'paused' if changed else 'is already paused'}")


@bgjobs_commands.command("resume")
@click.argument("names", nargs=-1, required=True)
@one_sentence
def resume_command(names: Sequence[str]) -> None:
    """Allow workers to claim jobs of these queues again."""
    for name in names:
        changed = actions.resume(current_state(), name, this_user())
        click.echo(f"Queue {name} {'resumed' if changed else 'is not paused'}")


@bgjobs_commands.command("workers")
@click.option("--all", "ended", is_flag=True, help="Also workers that stopped or died.")
@json_option
@one_sentence
def workers_command(ended: bool, as_json: bool) -> None:
    """Show the workers and their status."""
    from ..operations.queries import list_workers

    workers = list_workers(current_state(), ended=ended)
    if as_json:
        print_json([plain(worker) for worker in workers])
    elif workers:
        print_table(
            ["ID", "NAME", "HOST", "PID", "POOL", "SIZE", "QUEUES", "STATUS", "HEARTBEAT",
             "RUNNING", "VERSION"],
            [_worker_cells(worker) for worker in workers],
        )  # fmt: skip
    else:
        click.echo("No workers")


def _worker_cells(worker: WorkerDetail) -> tuple[object, ...]:
    return (
        worker.id,
        worker.name,
        worker.host,
        worker.pid,
        worker.pool,
        worker.concurrency,
        "all" if worker.queues is None else ",".join(worker.queues),
        worker.status,
        f"{durations.in_words(worker.heartbeat_age_seconds)} ago",
        worker.running,
        worker.version,
    )


@bgjobs_commands.command("prune")
@click.option(
    "--status",
    "statuses",
    type=click.Choice([status.value for status in _FINISHED]),
    multiple=True,
    help="Only jobs with this status; may be repeated.",
)
@click.option(
    "--older-than",
    type=Duration(),
    help="Use this age instead of BGJOBS_RETENTION, such as 12h or 30d.",
)
@yes_option
@one_sentence
def prune_command(statuses: Sequence[str], older_than: float | None, yes: bool) -> None:
    """Delete finished jobs that are older than BGJOBS_RETENTION."""
    state = current_state()
    retention = _retention(state.config, statuses, older_than)
    if all(kept is None for kept in retention.values()):
        click.echo("BGJOBS_RETENTION sets no age for these jobs; specify one with --older-than")
        return
    count = state.store.count_prunable(retention)
    if count and not yes:
        click.confirm(f"Permanently delete {counted(count, 'job')}?", abort=True)
    _prune(state, retention, count)


def _retention(
    config: Config, statuses: Sequence[str], older_than: float | None
) -> Mapping[JobStatus, float | None]:
    chosen = [status for status in _FINISHED if status in statuses or not statuses]
    if older_than is not None:
        return dict.fromkeys(chosen, older_than)
    return {status: config.retention[status] for status in chosen}


def _prune(state: AppState, retention: Mapping[JobStatus, float | None], count: int) -> None:
    from ..flow.limits.definition import rules
    from ..worker.prune import Pruner

    import_jobs(state)
    pruner = Pruner(state.store, retention, rules(state))
    with progress_bar(count, "Jobs") as advance:
        seen, more = 0, True
        while more:
            more = pruner.step()
            advance(pruner.deleted + pruner.held - seen)
            seen = pruner.deleted + pruner.held
    click.echo(
        f"{counted(pruner.deleted, 'job')} deleted, {pruner.held:,} referenced by other tables"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Health:
    healthy: bool
    database: bool
    alive: int = 0
    silent: int = 0
    unserved: Sequence[str] = ()
    waiting_for_code: Sequence[str] = ()
    message: str = ""


@bgjobs_commands.command("health")
@json_option
@one_sentence
def health_command(as_json: bool) -> None:
    """Check that the database responds and a worker is alive; exit code 1 if not."""
    health = _health(current_state())
    if as_json:
        print_json(dataclasses.asdict(health))
    else:
        click.echo(health.message)
    if not health.healthy:
        sys.exit(1)


def _health(state: AppState) -> _Health:
    from ..operations.queries import HEALTH_SECONDS, service_now

    try:
        service = service_now(state, within=HEALTH_SECONDS)
    except SQLAlchemyError as error:
        return _Health(False, False, message=f"Not healthy: {database_sentence(error)}")
    message = (
        f"Healthy: {counted(service.alive, 'worker')} alive"
        if service.alive
        else "Not healthy: no worker is alive; start one with: flask bgjobs worker"
    )
    if service.silent:
        message += f", {service.silent:,} silent"
    if service.unserved:
        message += f"; no live worker serves {', '.join(service.unserved)}"
    if waiting := service.waiting_for_code:
        message += f"; jobs wait for code that their workers do not have: {', '.join(waiting)}"
    return _Health(
        service.alive > 0,
        True,
        service.alive,
        service.silent,
        service.unserved,
        waiting,
        message,
    )
