"""Chaos: run thousands of jobs while workers and the database fail, then verify every promise.

``python -m tests.chaos --help`` explains how to run it, also on your own database.

``app`` and ``jobs`` are the host app that real workers run. ``plan`` draws the jobs and their
expected outcomes, ``load`` enqueues and cancels them, ``crew`` keeps workers running, and
``faults`` breaks the workers and the database. Independently of the package's code, ``journal``
records each run of a job and ``history`` each change of a row. ``verify`` checks both records,
``report`` prints the results, and ``run`` executes these steps in order.
"""
