"""What a job leaves for people to read: log lines, tracebacks and reports of failures."""
