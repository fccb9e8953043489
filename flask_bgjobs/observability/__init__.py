"""Log lines, tracebacks and failure reports of jobs."""
