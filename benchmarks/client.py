"""The process that enqueues jobs, in the role of a web process.

Usage: ``python -m benchmarks.client CONTENDER ACT [FIRST END]``. The acts ``one-by-one`` and
``in-bulk`` print the seconds that they took.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator

from . import journal
from .contender import URL_VARIABLE
from .contenders import ALL


def main() -> None:
    """Perform the act given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client")
    parser.add_argument("contender", choices=ALL)
    parser.add_argument("act", choices=["prepare", "one-by-one", "in-bulk", "paced"])
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("end", type=int, nargs="?", default=0)
    parser.add_argument("--every", type=float, default=0.0, help="seconds between two paced jobs")
    options = parser.parse_args()
    contender = ALL[options.contender](os.environ[URL_VARIABLE])
    numbers = range(options.first, options.end)
    match options.act:
        case "prepare":
            contender.prepare()
        case "one-by-one":
            print(_seconds(contender.enqueue_one_by_one, numbers))
        case "in-bulk":
            print(_seconds(contender.enqueue_in_bulk, numbers))
        case "paced":
            contender.enqueue_one_by_one(_paced(numbers, options.every))


def _seconds(enqueue: Callable[[range], None], numbers: range) -> float:
    """The time for all jobs but the first, which also imports the queue and connects."""
    enqueue(numbers[:1])
    began = time.perf_counter()
    enqueue(numbers[1:])
    return time.perf_counter() - began


def _paced(numbers: range, every: float) -> Iterator[int]:
    """Yield each number when it is to be enqueued, after recording it in the journal of this
    process.

    The pauses vary by half, so that they are not synchronized with a worker's polling.
    """
    for number in numbers:
        time.sleep(every * random.uniform(0.5, 1.5))
        journal.record(number)
        yield number


if __name__ == "__main__":
    main()
