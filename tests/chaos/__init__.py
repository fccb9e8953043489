"""Chaos: thousands of jobs while workers and the database break, then a proof that all is well.

``python -m tests.chaos --help`` says how to run it, also against a database of your own.

``app`` and ``jobs`` are the host that real workers serve, ``plan`` says what is enqueued and what
must become of it, ``load`` enqueues and cancels, ``crew`` keeps workers running, ``faults`` breaks
them and the database. Meanwhile ``journal`` and ``history`` note, outside of the package's own
logic, what ran and what became of each row. ``verify`` judges these notes, ``report`` prints them,
and ``run`` is the order of it all.
"""
