"""The statements, one act of a job's life in each module."""
