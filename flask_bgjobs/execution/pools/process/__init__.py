"""The process pool: jobs run in child processes, which a fork server starts."""
