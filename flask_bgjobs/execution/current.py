"""``current_job``: what running code can read and report about its own job."""

from __future__ import annotations

import contextvars
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from werkzeug.local import LocalProxy

from ..errors import JobCancelled
from ..job import serialize
from ..job.records import MAX_LINES, JobSpec, Report
from ..job.redact import MASK
from ..job.text import storable
from ..system.safe_logging import logger as _logger

_NO_META = "{}"
_MAX_MASKED_CHARS = 2**20
"""Most characters of a text that are searched for secrets."""


class CurrentJob:
    """The running attempt of a job, for the job's own code.

    Progress and log lines are kept in memory and written a few times a second, so a loop may report
    each of its steps.
    """

    def __init__(self, spec: JobSpec, *, max_payload: int | None = None) -> None:
        self._spec = spec
        self._max_payload = max_payload
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._dropped = 0
        self._progress: float | None = None
        self._note: str | None = None
        self._warned_of_progress = False
        self._written_meta = spec.meta_json or _NO_META
        self._cancelled = False
        self._make_masker: Callable[[], Callable[[str], str]] | None = None
        self._masker: Callable[[str], str] | None = None
        self.raised: tuple[BaseException, BaseException] | None = None
        """The exception that ended the attempt, and a copy without secrets; for :mod:`.execute`."""
        self._report: Callable[[], None] | None = None
        self.meta: dict[str, Any] = _readable_meta(self._written_meta)
        """A dict for the job's own data, stored with the job and kept over all its attempts."""

    @property
    def id(self) -> int:
        """The job's id."""
        return self._spec.id

    @property
    def attempt(self) -> int:
        """The number of this attempt: how often the job has been claimed, from 1."""
        return self._spec.attempt

    @property
    def retry_count(self) -> int:
        """The number of retries used before this attempt."""
        return self._spec.retry_count

    @property
    def queue(self) -> str:
        """The name of the job's queue."""
        return self._spec.queue

    @property
    def cancelled(self) -> bool:
        """Whether the job's cancellation was requested. A loop can check it and stop cleanly."""
        return self._cancelled

    def raise_if_cancelled(self) -> None:
        """Stop the job here if its cancellation was requested.

        :raises JobCancelled: if it was requested.
        """
        if self.cancelled:
            raise JobCancelled

    def progress(self, fraction: float, note: str | None = None) -> None:
        """Report how much of the job is done.

        :param fraction: 0 to 1. Values outside this range are clipped to it, and a warning is
            logged.
        :param note: a few words, such as ``"4 of 10"``; default: keep the last note.
        :raises ValueError: when ``fraction`` is no number.
        """
        fraction = float(fraction)
        if math.isnan(fraction):
            raise ValueError("progress must be a number from 0 to 1, not nan")
        if not (0 <= fraction <= 1 or self._warned_of_progress):
            self._warned_of_progress = True
            _logger.warning(
                "Progress is a fraction from 0 to 1 | Job: %s | Given: %g", self.id, fraction
            )
        with self._lock:
            self._progress = min(max(fraction, 0.0), 1.0)
            if note is not None:
                self._note = storable(self.masked(str(note)))[:255]

    def log(self, message: object) -> None:
        """Store a log line with the job. Its page on the dashboard shows it."""
        line = storable(self.masked(str(message)))
        with self._lock:
            if len(self._lines) == MAX_LINES:
                self._dropped += 1
            self._lines.append(line)

    def mask_with(self, make_masker: Callable[[], Callable[[str], str]]) -> None:
        """Mask secrets in all further texts; for :mod:`.execute`.

        :param make_masker: makes the function that masks a text. It is called with the first text,
            because most jobs report none.
        """
        self._make_masker, self._masker = make_masker, None

    def masked(self, text: str) -> str:
        """A text without the job's secrets.

        Call it before the text is cut: a part of a secret would not be recognized.
        """
        if self._make_masker is None:
            return text
        if len(text) > _MAX_MASKED_CHARS:
            # Much more than is stored of any text, so the omitted middle is never shown.
            text = f"{text[: _MAX_MASKED_CHARS // 2]}…{text[-_MAX_MASKED_CHARS // 2 :]}"
        try:
            if self._masker is None:
                self._masker = self._make_masker()
            return self._masker(text)
        except Exception:
            # Show nothing rather than a secret. The attempt must not fail because of this.
            return MASK

    def report_with(self, report: Callable[[], None]) -> None:
        """Set the function that reports the attempt's failure; for :mod:`.execute`."""
        self._report = report

    def report_failure(self) -> None:
        """Report the attempt's failure, if any. Pools call it after they have handed over its
        outcome."""
        report, self._report = self._report, None
        if report is not None:
            report()

    def after_fork_in_child(self) -> None:
        """Make a new lock, because another thread of the parent may have held the old one."""
        self._lock = threading.Lock()

    def request_cancel(self) -> None:
        """Make :attr:`cancelled` true. Pools call it."""
        self._cancelled = True

    def take_report(self) -> Report | None:
        """The changes since the last call, or ``None`` if there are none. Pools call it."""
        meta = self._changed_meta()
        with self._lock:
            lines = tuple(self._lines)
            if self._dropped:
                lines = (f"({self._dropped:,} lines left out)", *lines)
            if self._progress is None and self._note is None and meta is None and not lines:
                return None
            report = Report(self._progress, self._note, meta, lines)
            self._lines.clear()
            self._dropped = 0
            self._progress = self._note = None
            return report

    def _changed_meta(self) -> str | None:
        try:
            if self._has_no_meta() and self._written_meta == _NO_META:
                return None
            text = serialize.dumps(self.meta, name="meta", max_bytes=self._max_payload)
        except serialize.NotSerializable:
            # The job is changing it, or it cannot be stored; check_meta() decides at the end.
            return None
        if text == self._written_meta:
            return None
        self._written_meta = text
        return text

    def check_meta(self) -> None:
        """Check that :attr:`meta` can be stored.

        :raises NotSerializable: names the value that cannot be stored.
        """
        if not self._has_no_meta():
            serialize.dumps(self.meta, name="current_job.meta", max_bytes=self._max_payload)

    def _has_no_meta(self) -> bool:
        # A job may assign any object, even one whose comparison raises.
        return type(self.meta) is dict and not self.meta


def _readable_meta(text: str) -> dict[str, Any]:
    """The stored meta; empty if the column was edited and is no JSON object."""
    if text == _NO_META:
        return {}
    try:
        meta = serialize.loads(text)
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


_current: contextvars.ContextVar[CurrentJob] = contextvars.ContextVar("bgjobs_current_job")

current_job = cast(
    CurrentJob,
    LocalProxy(
        _current, unbound_message="current_job is only available inside a job that a worker runs"
    ),
)
"""The job whose code is running. Outside a job, its use raises ``RuntimeError``."""


def enter(job: CurrentJob) -> contextvars.Token[CurrentJob]:
    """Make ``job`` the current one."""
    return _current.set(job)


def leave(token: contextvars.Token[CurrentJob]) -> None:
    """Undo :func:`enter`."""
    _current.reset(token)


def _after_fork_in_child() -> None:
    job = _current.get(None)
    if job is not None:
        job.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
