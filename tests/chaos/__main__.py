"""``python -m tests.chaos``: five minutes of chaos, and what came of them."""

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
    """The exit code."""
    options = _parser().parse_args()
    seed = random.randrange(_SEEDS) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    try:
        report = run(options.database, seconds=options.seconds, seed=seed, say=_say)
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


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Enqueue thousands of jobs while workers are killed, stalled and stopped and "
        "the database is in trouble; then prove from a journal outside the database and a history "
        "that the database itself writes that no job was lost, settled twice, stuck or wrongly "
        "quarantined.",
        epilog="Exit code: 0 all is well; 1 a promise was broken, or there was too little chaos to "
        "prove anything; 2 chaos could not run.",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=300.0,
        metavar="N",
        help="of chaos (%(default)g); the drain comes on top",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of jobs and faults (random, printed first); their timing differs in each run",
    )
    parser.add_argument(
        "--database",
        default="sqlite",
        metavar="WHICH",
        help="sqlite: a new file; postgresql or mysql: a new server with its own data, which is "
        "restarted meanwhile; or the URL of a scratch database of yours: on PostgreSQL chaos makes "
        "a schema of its own in it, and on MySQL and MariaDB a database of its own beside it, cuts "
        "only its own connections, and drops what it made at the end; of SQLite the URL names a "
        "file that does not exist yet (%(default)s)",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
