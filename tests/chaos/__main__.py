"""``python -m tests.chaos``: run five minutes of chaos and print the report."""

from __future__ import annotations

import argparse
import random
import sys

import pytest

from .database import CannotRun
from .run import run

_SEEDS = 1_000_000
_GOOD, _BROKEN, _NOT_RUN = range(3)


def main() -> int:
    """Run chaos; returns the exit code."""
    options = _parser().parse_args()
    seed = random.randrange(_SEEDS) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    try:
        report = run(options.database, seconds=options.seconds, seed=seed, say=_print_progress)
    except CannotRun as error:
        print(f"Error: {error}", file=sys.stderr)
        return _NOT_RUN
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        print(f"Error: {missing}", file=sys.stderr)
        return _NOT_RUN
    except KeyboardInterrupt:
        print("Stopped; everything is cleaned up", file=sys.stderr)
        return _NOT_RUN
    print(report)
    return _GOOD if report.is_good else _BROKEN


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Enqueue thousands of jobs while workers are killed, stalled and stopped and "
        "the database fails. Then verify, from a journal outside the database and a history that "
        "database triggers write, that no job was lost, settled twice, stuck or wrongly "
        "quarantined.",
        epilog="Exit code: 0 all promises were kept; 1 a promise was broken, or there were too few "
        "faults to prove anything; 2 chaos could not run.",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=300.0,
        metavar="N",
        help="length of the chaos phase in seconds (%(default)g); the drain takes extra time",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed for jobs and faults (random, printed first); their timing differs in each run",
    )
    parser.add_argument(
        "--database",
        default="sqlite",
        metavar="WHICH",
        help="sqlite: a new file; postgresql or mysql: a new server with its own data, which is "
        "restarted during the run; or the URL of your own scratch database. On PostgreSQL chaos "
        "creates a schema in that database, on MySQL and MariaDB another database on that server. "
        "It ends only its own connections, and drops what it created. A SQLite URL must name a "
        "file that does not exist (%(default)s)",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
