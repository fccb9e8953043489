"""What flask-bgjobs costs, beside other job queues, measured in one run on one machine.

``python -m benchmarks --help`` says how. Everything is measured from outside: through the public
API of each queue and the command of its worker.
"""
