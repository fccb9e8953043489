"""``python -m benchmarks``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from . import contenders, measures
from .measure import Scale
from .plots import write_plots
from .processes import ROOT
from .report import print_tables, write_tables
from .results import Results
from .session import Session

_QUICK_SHARE = 0.1
_DOCS = ROOT / "docs" / "_performance"


def main() -> int:
    """Measure or read results, and print them.

    :returns: the exit code.
    """
    options = _parser().parse_args()
    # Set explicitly, because a shell starts background programs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        results = _read(options.read) if options.read else _measure(options)
    except KeyboardInterrupt:
        _say("Stopped; servers and temporary files have been removed")
        return 130
    print_tables(results, print)
    if options.write:
        write_tables(results, _DOCS)
        write_plots(results, _DOCS)
    return 0


def _read(path: Path) -> Results:
    return Results.from_json(path.read_text())


def _measure(options: argparse.Namespace) -> Results:
    scale = Scale(options.jobs, options.idle_seconds, _QUICK_SHARE if options.quick else 1.0)
    session = Session(scale, _say, lambda so_far: options.json.write_text(so_far.as_json()))
    return session.hold(
        [contenders.ALL[name] for name in options.only or contenders.ALL],
        [measures.ALL[name] for name in options.measure or measures.ALL],
        1 if options.quick else options.runs,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure flask-bgjobs and other job queues. Database servers are started for "
        "the run, and removed afterwards. Requires Linux, and the programs of PostgreSQL, MariaDB "
        "and Redis for the queues that use them.",
        epilog=f"Contenders: {', '.join(contenders.ALL)}. Measurements: {', '.join(measures.ALL)}.",
    )
    parser.add_argument(
        "--only", nargs="+", choices=contenders.ALL, metavar="NAME", help="contenders (all)"
    )
    parser.add_argument(
        "--measure", nargs="+", choices=measures.ALL, metavar="NAME", help="measurements (all)"
    )
    parser.add_argument(
        "--runs", type=_positive, default=3, metavar="N", help="number of runs (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="jobs per throughput run (by contender)"
    )
    parser.add_argument(
        "--idle-seconds", type=_positive, metavar="N", help="time to watch an idle worker (60)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one run with a tenth of the jobs: rough figures"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmark.json"),
        metavar="FILE",
        help="file for all figures (%(default)s)",
    )
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="do not measure; read the figures from a file"
    )
    parser.add_argument(
        "--write", action="store_true", help="write tables and plots to docs/_performance"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
