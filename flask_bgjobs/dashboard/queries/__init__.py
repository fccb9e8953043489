"""Everything that dashboard and CLI read. No row is changed here.

What these functions hand out is masked already, apart from :attr:`JobRow.job`, which is for
the authorizer only. So a template cannot show a secret by mistake. All statements run on the
store's own connection: the host's session is never touched.
"""

from .charts import PERIODS, Chart, Period, chart, finished_by_queue
from .cursors import InvalidCursor
from .detail import JobDetail, is_possible_id, job_detail
from .filters import DEFAULT_ORDER, ORDERS, JobFilters
from .listing import MAX_PER_PAGE, Page, list_jobs, recent_failures
from .queues import QueueStats, queue_stats
from .rows import JobRow
from .search import InvalidSearch
from .service import HEALTH_SECONDS, Service, WorkerRow, service_now
from .shown import is_readable
from .stats import Count, Stats, count_by_status, stats_now
from .workers import WorkerDetail, count_live_workers, list_workers

__all__ = [
    "DEFAULT_ORDER",
    "HEALTH_SECONDS",
    "MAX_PER_PAGE",
    "ORDERS",
    "PERIODS",
    "Chart",
    "Count",
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
    "finished_by_queue",
    "is_possible_id",
    "is_readable",
    "job_detail",
    "list_jobs",
    "list_workers",
    "queue_stats",
    "recent_failures",
    "service_now",
    "stats_now",
]
