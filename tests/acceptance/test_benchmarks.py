"""A short run of the benchmark: it measures the throughput and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Results
from tests.acceptance.helpers import descendants
from tests.conftest import wait_until

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc"),
]

_ROOT = Path(__file__).parents[2]
_SECONDS = 120.0


def _benchmark(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    """Start the throughput benchmark on SQLite, with all temporary files in ``folder``."""
    temporary = folder / "temporary"
    temporary.mkdir()
    command = ["-m", "benchmarks", "--only", "bgjobs-sqlite", "--measure", "throughput"]
    options = ["--runs", "1", "--jobs", str(jobs), "--json", str(folder / "figures.json")]
    return subprocess.Popen(
        [sys.executable, *command, *options],
        cwd=_ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
    )


def test_throughput_is_measured(tmp_path: Path) -> None:
    """A short run reports a throughput and deletes its temporary files."""
    assert _benchmark(tmp_path, 200).wait(_SECONDS) == 0
    entry = Results.from_json((tmp_path / "figures.json").read_text()).entry(
        "throughput", "bgjobs-sqlite"
    )
    assert entry.failure is None
    assert entry.runs[0]["jobs_per_second"] > 0
    assert not list((tmp_path / "temporary").iterdir())


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C ends the measured worker and deletes its database."""
    benchmark = _benchmark(tmp_path, 5_000)
    temporary = tmp_path / "temporary"
    try:
        wait_until(lambda: any(temporary.glob("*/worker.log")), "a worker")
        started = descendants(benchmark.pid)
        benchmark.send_signal(signal.SIGINT)
        assert benchmark.wait(_SECONDS) == 130
    finally:
        benchmark.kill()
        benchmark.wait()
    assert started
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not list(temporary.iterdir())
