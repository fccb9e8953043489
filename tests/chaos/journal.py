"""The journal: a file outside the database that records the start and end of each run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flask_bgjobs import current_job

START, END, RAISED = "start", "end", "raised"


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """One line of the journal."""

    event: str
    job_id: int
    attempt: int
    token: int
    """The harness's number for the job: the ids of rolled-back jobs are used again."""
    pid: int
    at: float
    """By the machine's clock, in seconds since 1970."""


class Journal:
    """Writes notes, each with a single write, so that a killed process leaves no partial line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def recorded(self, token: int) -> Iterator[None]:
        """Record the start of the current job, and its end if its code ends."""
        self._write(START, token)
        try:
            yield
        except BaseException:
            self._write(RAISED, token)
            raise
        self._write(END, token)

    def _write(self, event: str, token: int) -> None:
        words = (event, current_job.id, current_job.attempt, token, os.getpid(), time.time())
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, f"{' '.join(map(str, words))}\n".encode())
        finally:
            os.close(descriptor)


@dataclasses.dataclass(slots=True)
class Run:
    """One run of a job's code, as recorded."""

    start: Note
    ended: str | None = None
    """:data:`END` or :data:`RAISED`; ``None`` if the process was killed."""
    ended_at: float | None = None


class Reader:
    """Reads the journal while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.runs: dict[tuple[int, int], list[Run]] = collections.defaultdict(list)
        """By job id and attempt; more than one run of an attempt is a violation."""

    def read(self) -> None:
        """Read the lines that were written since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode().splitlines():
            event, job_id, attempt, token, pid, at = line.split()
            self._add(Note(event, int(job_id), int(attempt), int(token), int(pid), float(at)))

    def starts(self) -> Mapping[int, list[Note]]:
        """The starts of each job, in order."""
        found: dict[int, list[Note]] = collections.defaultdict(list)
        for runs in self.runs.values():
            for run in runs:
                found[run.start.job_id].append(run.start)
        for starts in found.values():
            starts.sort(key=lambda start: start.at)
        return found

    def _add(self, note: Note) -> None:
        runs = self.runs[note.job_id, note.attempt]
        if note.event == START:
            runs.append(Run(note))
        for run in runs:
            if note.event != START and run.start.pid == note.pid and run.ended is None:
                run.ended, run.ended_at = note.event, note.at
