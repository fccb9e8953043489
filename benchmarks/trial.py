"""A trial: one contender on a new, empty database, with its own journal."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import journal
from .contender import Contender, SqlContender
from .processes import Background, environment_with, python
from .stores import Store, Stores

_POLL_SECONDS = 0.01
_SETTLE_SECONDS = 0.05
_STALLED_SECONDS = 60.0
"""Time without a finished job after which a trial fails."""


class TrialFailed(Exception):
    """The contender did not complete its jobs. The message is one sentence."""


class Trial:
    """A context manager for a trial. At the end, its database and files are removed.

    :param contender: the class of the contender.
    """

    def __init__(self, contender: type[Contender], stores: Stores) -> None:
        self.store: Store = stores.get(contender.store)
        url = self.store.new_database()
        self.contender = contender(url)
        # A TemporaryDirectory, because it is removed even if the trial is not entered.
        folder = tempfile.TemporaryDirectory(prefix="bgjobs-benchmark-")
        self._folder = Path(folder.name)
        self.journal = self._folder / "journal"
        self.trace = self._folder / "trace"
        """The file in which a worker on SQLite counts its statements."""
        self._stack = contextlib.ExitStack()
        self._stack.callback(folder.cleanup)
        self._stack.callback(self.store.drop, url)
        self._stack.callback(self.contender.close)

    def __enter__(self) -> Self:
        try:
            self._client("prepare")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def database(self) -> SqlContender:
        """The contender, if it stores its jobs in an SQL database."""
        assert isinstance(self.contender, SqlContender)
        return self.contender

    def enqueue_one_by_one(self, numbers: range) -> float:
        """Enqueue jobs one by one.

        :returns: the seconds for all jobs but the first.
        """
        return float(self._client("one-by-one", numbers))

    def enqueue_in_bulk(self, numbers: range) -> float:
        """Enqueue jobs in bulk.

        :returns: the seconds for all jobs but the first.
        """
        return float(self._client("in-bulk", numbers))

    def fill(self, numbers: range) -> None:
        """Enqueue a job for each number, in bulk if possible."""
        if self.contender.has_bulk:
            self.enqueue_in_bulk(numbers)
        else:
            self.enqueue_one_by_one(numbers)

    def enqueue_paced(self, numbers: range, every: float) -> journal.Journal:
        """Enqueue a job about every ``every`` seconds.

        :returns: the time before each enqueue.
        """
        stamps = self._folder / "stamps"
        self._client("paced", numbers, "--every", str(every), journal_path=stamps)
        return journal.Journal.read(stamps)

    @contextlib.contextmanager
    def worker(self, **variables: str) -> Iterator[Background]:
        """Run a worker during the block.

        :param variables: additional environment variables.
        """
        environment = {**self._environment(self.journal), **variables}
        command = self.contender.worker_command()
        with Background(command, environment, self._folder / "worker.log") as worker:
            yield worker

    def execute(self, command: Sequence[str], *, journal_path: Path | None = None) -> str:
        """Run a command.

        :param journal_path: the journal of jobs that run in the command; default: a file that is
            ignored.
        :returns: the last line of its output.
        :raises TrialFailed: when the command fails.
        """
        done = subprocess.run(
            command,
            env=environment_with(self._environment(journal_path or self._folder / "ignored")),
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            why = done.stderr.strip().rpartition("\n")[2]
            raise TrialFailed(f"{' '.join(command[1:])}: {why}")
        return done.stdout.strip().rpartition("\n")[2]

    def recorded(self) -> int:
        """The number of jobs that have run so far."""
        return journal.count(self.journal)

    def wait_until(
        self, is_done: Callable[[], bool], worker: Background, every: float = _POLL_SECONDS
    ) -> None:
        """Wait until ``is_done`` returns true.

        :param every: seconds between two checks.
        :raises TrialFailed: when the worker has ended, or no job has run for a minute.
        """
        last_count, last_change = self.recorded(), time.monotonic()
        while not is_done():
            now, count = time.monotonic(), self.recorded()
            if count != last_count:
                last_count, last_change = count, now
            if worker.has_ended:
                raise TrialFailed(f"the worker has ended: {worker.last_output()}")
            if now - last_change > _STALLED_SECONDS:
                raise TrialFailed(f"no progress after {count:,} jobs: {worker.last_output()}")
            time.sleep(every)

    def wait_until_settled(self, worker: Background) -> None:
        """Wait until all jobs are recorded as done.

        :raises TrialFailed: see :meth:`wait_until`.
        """
        # Less often, because each check is a query that burdens the database.
        self.wait_until(lambda: self.contender.unsettled() == 0, worker, every=_SETTLE_SECONDS)

    def check(self, numbers: range) -> journal.Journal:
        """Check that each of ``numbers`` ran exactly once, and that all are recorded as done.

        :returns: the journal.
        :raises TrialFailed: when this is not the case.
        """
        read = journal.Journal.read(self.journal)
        if problem := read.problem(numbers):
            raise TrialFailed(problem)
        if left := self.contender.unsettled():
            raise TrialFailed(f"{left:,} jobs ran, but are not recorded as done")
        return read

    def _client(
        self, act: str, numbers: range = range(0), *options: str, journal_path: Path | None = None
    ) -> str:
        words = (act, str(numbers.start), str(numbers.stop), *options)
        command = python("-m", "benchmarks.client", self.contender.name, *words)
        return self.execute(command, journal_path=journal_path)

    def _environment(self, journal_path: Path) -> dict[str, str]:
        return {**self.contender.environment(), journal.VARIABLE: str(journal_path)}
