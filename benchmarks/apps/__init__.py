"""An app for each queue, as a project would write it: the setup and one job.

The workers and the process that enqueues import these modules. They read the URL of the store from
the environment.
"""

LOG_LEVEL_VARIABLE = "BENCHMARK_LOG_LEVEL"
"""The environment variable for the log level of workers. The default is WARNING, so that log lines
which other queues do not write do not affect the comparison."""
PGQUEUER_BATCH = 200
"""Jobs that a worker of PgQueuer takes at once."""
