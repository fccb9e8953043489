"""The SQL statements: one module for each act in the life of a job."""
