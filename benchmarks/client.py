"""The process that enqueues: it stands for the web process, and never measures a worker.

``python -m benchmarks.client CONTENDER ACT [FIRST END]``; an enqueue prints the seconds it took.
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
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client")
    parser.add_argument("contender", choices=ALL)
    parser.add_argument("act", choices=["prepare", "one-by-one", "in-bulk", "paced"])
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("end", type=int, nargs="?", default=0)
    parser.add_argument("--every", type=float, default=0.0, help="seconds between two if paced")
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
    """What all but the first job took: with that one the queue is imported and connected."""
    enqueue(numbers[:1])
    began = time.perf_counter()
    enqueue(numbers[1:])
    return time.perf_counter() - began


def _paced(numbers: range, every: float) -> Iterator[int]:
    """Each number when it is to be enqueued, noted in this process's own journal just before.

    The pauses are spread by half, so that they keep no step with anybody's polling.
    """
    for number in numbers:
        time.sleep(every * random.uniform(0.5, 1.5))
        journal.record(number)
        yield number


if __name__ == "__main__":
    main()
