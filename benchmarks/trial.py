"""A trial: one contender on an empty database of its own, with a journal of its own."""

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

_LOOK_SECONDS = 0.01
_SETTLE_SECONDS = 0.05
_STALLED_SECONDS = 60.0
"""So long may pass without any job being done."""


class TrialFailed(Exception):
    """The contender did not do what it was given; says what in one sentence."""


class Trial:
    """Used as a context, everything of it is gone after it.

    :param contender: the class, not yet on any database.
    """

    def __init__(self, contender: type[Contender], stores: Stores) -> None:
        self.store: Store = stores.get(contender.store)
        url = self.store.new_database()
        self.contender = contender(url)
        # Not a bare folder: this one goes away however the trial ends.
        folder = tempfile.TemporaryDirectory(prefix="bgjobs-benchmark-")
        self._folder = Path(folder.name)
        self.journal = self._folder / "journal"
        self.trace = self._folder / "trace"
        """For the statements of a traced worker."""
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
        """The contender, which keeps its jobs in a database."""
        assert isinstance(self.contender, SqlContender)
        return self.contender

    def enqueue_one_by_one(self, numbers: range) -> float:
        """Seconds that it took for all but the first."""
        return float(self._client("one-by-one", numbers))

    def enqueue_in_bulk(self, numbers: range) -> float:
        """Seconds that it took for all but the first."""
        return float(self._client("in-bulk", numbers))

    def fill(self, numbers: range) -> None:
        """Enqueue a job for each number in the quickest way."""
        if self.contender.has_bulk:
            self.enqueue_in_bulk(numbers)
        else:
            self.enqueue_one_by_one(numbers)

    def enqueue_paced(self, numbers: range, every: float) -> journal.Journal:
        """When each job was about to be enqueued, about ``every`` so many seconds."""
        stamps = self._folder / "stamps"
        self._client("paced", numbers, "--every", str(every), journal_path=stamps)
        return journal.Journal.read(stamps)

    @contextlib.contextmanager
    def worker(self, **variables: str) -> Iterator[Background]:
        """A worker while the block runs; with more variables in its environment."""
        environment = {**self._environment(self.journal), **variables}
        command = self.contender.worker_command()
        with Background(command, environment, self._folder / "worker.log") as worker:
            yield worker

    def execute(self, command: Sequence[str], *, journal_path: Path | None = None) -> str:
        """The last line that a command prints.

        :param journal_path: where it records what runs in it; by default that is thrown away.
        :raises TrialFailed: when it fails.
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
        """How many jobs have run so far."""
        return journal.count(self.journal)

    def wait_until(
        self, is_done: Callable[[], bool], worker: Background, every: float = _LOOK_SECONDS
    ) -> None:
        """Return when ``is_done``, while the worker goes on.

        :raises TrialFailed: when the worker has ended, or has done nothing for a minute.
        """
        last_count, last_change = self.recorded(), time.monotonic()
        while not is_done():
            now, count = time.monotonic(), self.recorded()
            if count != last_count:
                last_count, last_change = count, now
            if worker.has_ended:
                raise TrialFailed(f"the worker has ended: {worker.last_words()}")
            if now - last_change > _STALLED_SECONDS:
                raise TrialFailed(f"nothing moves after {count:,} jobs: {worker.last_words()}")
            time.sleep(every)

    def wait_until_settled(self, worker: Background) -> None:
        """Return when all jobs are recorded as done.

        :raises TrialFailed: as :meth:`wait_until`.
        """
        # Not too often: each look is work for the database, too.
        self.wait_until(lambda: self.contender.unsettled() == 0, worker, every=_SETTLE_SECONDS)

    def check(self, numbers: range) -> journal.Journal:
        """The journal, when each of ``numbers`` ran once and all are recorded as done.

        :raises TrialFailed: when that is not so.
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
