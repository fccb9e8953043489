"""Commands about jobs: ``enqueue``, ``list``, ``show``, ``retry``, ``cancel``, ``delete``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import JobNotFound
from ..job import serialize
from ..job.records import MAX_ID
from ..job.statuses import JobStatus
from ..job.text import one_line, printable_lines
from ..operations import actions
from ..state import current_state, import_jobs
from .group import bgjobs_commands, json_option, one_sentence
from .output import print_json, print_table
from .selection import Verb, act_on_chosen, chosen_jobs
from .user import this_user

if TYPE_CHECKING:
    from ..operations.queries import JobRow

_RETRY = Verb("retry", actions.retry, "Retry {}?")
_CANCEL = Verb("cancel", actions.cancel, "Cancel {}?")
_DELETE = Verb("delete", actions.delete, "Permanently delete {}?", asks_for_ids=True)


@bgjobs_commands.command("enqueue")
@click.argument("target")
@click.argument("method", required=False)
@click.option("-p", "--parameters", default="[]", help="Parameters, as a JSON list or object.")
@click.option("--queue", help="Name of the queue.")
@click.option("--priority", help="A number or a name; higher runs first.")
@click.option("--delay", type=float, help="Seconds to wait before the first attempt.")
@click.option("--retries", type=int, help="Retries after the first attempt.")
@click.option("--retry-delay", type=float, help="Seconds before each retry.")
@click.option("--timeout", type=float, help="Time limit of one attempt in seconds.")
@click.option("--unique-key", help="Enqueue only if no unfinished job has this key.")
@json_option
@one_sentence
def enqueue_command(
    target: str,
    method: str | None,
    parameters: str,
    priority: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Enqueue TARGET, a function or a class on the allow-list. For a class, name the METHOD."""
    import_jobs(current_state())
    job = actions.dispatch(
        current_state(),
        this_user(),
        target,
        method,
        _parsed(parameters),
        priority=_priority(priority),
        **options,
    )
    if as_json:
        print_json({"id": job.id, "status": job.status, "deduplicated": job.deduplicated})
    else:
        outcome = "is already enqueued" if job.deduplicated else f"enqueued, {job.status}"
        click.echo(f"Job {job.id} {outcome}: {job.name}")


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
@click.option("--error", default="", help="Only jobs that raised this exception class.")
@click.option(
    "--search", default="", help="Text in name, parameters, error, tags, owner or key; or an id."
)
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True)
@json_option
@one_sentence
def list_command(
    status: Sequence[str],
    queue: Sequence[str],
    error: str,
    search: str,
    limit: int,
    as_json: bool,
) -> None:
    """List jobs, newest first."""
    from ..operations.queries import InvalidSearch, JobFilters, job_data, list_jobs

    import_jobs(current_state())
    try:
        filters = JobFilters(statuses=tuple(status), queues=tuple(queue), error=error, q=search)
        rows = list_jobs(current_state(), filters, per=limit).jobs
    except InvalidSearch as wrong:
        raise click.BadParameter(one_line(str(wrong)), param_hint="--search") from None
    if as_json:
        print_json([job_data(row) for row in rows])
    else:
        _print_rows(rows)


@bgjobs_commands.command("show")
@click.argument("job_id", type=click.IntRange(1, MAX_ID))
@json_option
@one_sentence
def show_command(job_id: int, as_json: bool) -> None:
    """Show a job: its fields, its log, and the attempts that did not complete."""
    from ..operations.queries import detail_data, job_detail

    state = current_state()
    import_jobs(state)
    job = state.store.get(job_id)
    if job is None:
        raise JobNotFound(f"job {job_id} does not exist")
    detail = job_detail(state, job)
    data = detail_data(detail)
    if as_json:
        print_json(data)
    else:
        _print_job(data)


@bgjobs_commands.command("retry")
@chosen_jobs(_RETRY)
@one_sentence
def retry_command(**chosen: Any) -> None:
    """Run failed, cancelled or retrying jobs again now, with all their retries."""
    act_on_chosen(_RETRY, **chosen)


@bgjobs_commands.command("cancel")
@chosen_jobs(_CANCEL)
@one_sentence
def cancel_command(**chosen: Any) -> None:
    """Cancel jobs; running ones are asked to stop."""
    act_on_chosen(_CANCEL, **chosen)


@bgjobs_commands.command("delete")
@chosen_jobs(_DELETE)
@one_sentence
def delete_command(**chosen: Any) -> None:
    """Permanently delete jobs that are not running."""
    act_on_chosen(_DELETE, **chosen)


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
        click.echo(printable_lines(attempt["traceback"] or ""))


def _print_rows(jobs: Sequence[JobRow]) -> None:
    if not jobs:
        click.echo("No jobs")
        return
    print_table(
        ["ID", "STATUS", "QUEUE", "PRIORITY", "RETRIES", "JOB", "ERROR"],
        [
            (
                job.id,
                job.state,
                job.queue,
                job.priority,
                f"{job.retry_count}/{job.retries}",
                job.name,
                job.error or "",
            )
            for job in jobs
        ],
    )
