"""Measures flask-bgjobs and other job queues in one run on one machine.

``python -m benchmarks --help`` lists the options. Everything is measured from outside: through
the public API of each queue and the command of its worker.
"""
