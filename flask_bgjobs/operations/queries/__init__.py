"""All queries of the dashboard and the command line. They change no rows.

Their results are masked, so that a template cannot show a secret by mistake. Only
:attr:`JobRow.job` is not masked; it is for the authorizer. All statements run on the store's own
connections, never in the host's session.
"""

from .audit import AuditPage, AuditRow, list_audit
from .charts import DEFAULT_PERIOD, PERIODS, Chart, Period, chart, finished_by_queue
from .cursors import InvalidCursor
from .data import detail_data, job_data
from .detail import JobDetail, is_possible_id, job_detail
from .errors import ErrorGroup, Errors, errors_in
from .filters import DEFAULT_ORDER, ORDERS, JobFilters
from .listing import (
    MAX_PER_PAGE,
    Page,
    count_new,
    is_listed,
    jobs_for_authorizer,
    list_jobs,
    newest_jobs,
    placeholder_job,
    recent_failures,
)
from .matching import count_matching, highest_id, matching_ids
from .queues import COUNTED_IN_QUEUES, QueueStats, queue_stats, queues_of, urgent_first
from .rows import JobRow
from .search import InvalidSearch
from .service import HEALTH_SECONDS, Service, WorkerRow, service_now
from .shown import is_readable
from .stats import Count, Stats, count_by_status, stats_now
from .workers import WorkerDetail, count_live_workers, last_worker, list_workers

__all__ = [
    "COUNTED_IN_QUEUES",
    "DEFAULT_ORDER",
    "DEFAULT_PERIOD",
    "HEALTH_SECONDS",
    "MAX_PER_PAGE",
    "ORDERS",
    "PERIODS",
    "AuditPage",
    "AuditRow",
    "Chart",
    "Count",
    "ErrorGroup",
    "Errors",
    "InvalidCursor",
    "InvalidSearch",
    "JobDetail",
    "JobFilters",
    "JobRow",
    "Page",
    "Period",
    "QueueStats",
    "Service",
    "Stats",
    "WorkerDetail",
    "WorkerRow",
    "chart",
    "count_by_status",
    "count_live_workers",
    "count_matching",
    "count_new",
    "detail_data",
    "errors_in",
    "finished_by_queue",
    "highest_id",
    "is_listed",
    "is_possible_id",
    "is_readable",
    "job_data",
    "job_detail",
    "jobs_for_authorizer",
    "last_worker",
    "list_audit",
    "list_jobs",
    "list_workers",
    "matching_ids",
    "newest_jobs",
    "placeholder_job",
    "queue_stats",
    "queues_of",
    "recent_failures",
    "service_now",
    "stats_now",
    "urgent_first",
]
