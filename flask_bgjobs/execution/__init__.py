"""Execution: runs the code of one attempt, in a thread or a child process."""
