"""For each queue what a project that uses it would write: its set-up and one job.

The workers import these modules, as does the process that enqueues. They read where the store is
from the environment.
"""

LOG_LEVEL_VARIABLE = "BENCHMARK_LOG_LEVEL"
"""The environment variable for what workers log; warnings unless it is set, so that no contender
pays for lines that another does not write."""
PGQUEUER_BATCH = 200
"""Jobs that a worker of PgQueuer takes at once."""
