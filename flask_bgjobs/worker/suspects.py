"""Suspects: jobs whose last worker died while it held them. One of them may be a poison job.

Most suspects are harmless, and a poison job usually kills its process at once. So suspects start
one at a time, and the start of each is committed before its code runs. The next suspect starts when
the last one has ended or has run for half a second.

If the worker dies while exactly one suspect runs, that suspect is proved to have crashed it. If
several run, none is blamed, and each becomes exclusive: in its next attempt, no other suspect of
the worker runs at the same time. A worker keeps at most one exclusive suspect, and no other
suspects beside it, because other workers may be free for them.

In a process pool, suspects start at once: a crash there ends only the child process of one job.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator

from ..job.records import JobSpec, Key

_PROVING_SECONDS = 0.5
"""How long a suspect runs before the next suspect may start."""


class Suspects:
    """The suspects that a worker has claimed."""

    def __init__(self) -> None:
        self._waiting: collections.deque[JobSpec] = collections.deque()
        self._claimed_at: dict[Key, float] = {}
        self._exclusive: Key | None = None
        """The suspect beside which no other suspect may run."""
        self._has_refused = False
        """Whether :meth:`add` has refused an exclusive suspect since other suspects are here."""
        self._running: dict[Key, float] = {}
        """Time by ``time.monotonic()`` at which the next suspect may start, by running suspect."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[JobSpec]:
        return iter(self._waiting)

    @property
    def may_claim(self) -> bool:
        """Whether suspects may be claimed.

        ``False`` while an exclusive suspect is kept here, and after one was refused, until all
        other suspects have ended.
        """
        return self._exclusive is None and (self._is_empty or not self._has_refused)

    def claimed_at(self, spec: JobSpec) -> float:
        """Time at which a waiting suspect was claimed, by ``time.monotonic()``."""
        return self._claimed_at[spec.key]

    def add(self, spec: JobSpec, *, is_exclusive: bool, claimed: float) -> bool:
        """Let a suspect wait for its turn.

        :param is_exclusive: whether no other suspect may run beside it.
        :param claimed: time of the claim, by ``time.monotonic()``.
        :returns: ``False`` if the suspect must be given back: an exclusive suspect is kept here, or
            it is exclusive itself and other suspects are kept here.
        """
        is_empty = self._is_empty
        self._has_refused = not is_empty and (self._has_refused or is_exclusive)
        if self._exclusive is not None or (is_exclusive and not is_empty):
            return False
        self._waiting.append(spec)
        self._claimed_at[spec.key] = claimed
        if is_exclusive:
            self._exclusive = spec.key
        return True

    def next(
        self, can_begin: Callable[[JobSpec], bool], has_own_process: Callable[[JobSpec], bool]
    ) -> JobSpec | None:
        """The suspect to start now, if any. It stays in the queue until :meth:`remove`.

        :param can_begin: whether a submitted job would start at once.
        :param has_own_process: whether a job runs in a child process, which runs one job at a time.
        """
        return next(
            (
                spec
                for spec in self._waiting
                if (has_own_process(spec) or self._are_proved()) and can_begin(spec)
            ),
            None,
        )

    def may_start_one(self, serves: Callable[[str], bool]) -> bool:
        """Whether a suspect of these queues waits only for a free thread or child process.

        :param serves: whether a queue is one of them.
        """
        return self._are_proved() and any(serves(spec.queue) for spec in self._waiting)

    def remove(self, spec: JobSpec) -> None:
        """Remove a suspect from the queue."""
        self._waiting.remove(spec)
        del self._claimed_at[spec.key]

    def note_start(self, spec: JobSpec, *, has_own_process: bool) -> None:
        """Note that a suspect starts."""
        proved_at = -math.inf if has_own_process else time.monotonic() + _PROVING_SECONDS
        self._running[spec.key] = proved_at

    def note_end(self, key: Key) -> bool:
        """Note the end of an attempt; does nothing if the job is no suspect.

        :returns: whether suspects may be claimed again because of it.
        """
        could_claim = self.may_claim
        self._running.pop(key, None)
        self._forget_exclusive(key)
        return self.may_claim and not could_claim

    def take_waiting(self) -> list[JobSpec]:
        """Remove and return all waiting suspects."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._claimed_at.clear()
        for spec in taken:
            self._forget_exclusive(spec.key)
        return taken

    def seconds_until_next(self) -> float:
        """Time until the next suspect may start; infinite when none waits for a running one."""
        proved_at = max(self._running.values(), default=-math.inf)
        left = proved_at - time.monotonic()
        return left if self._waiting and left > 0 else math.inf

    @property
    def _is_empty(self) -> bool:
        return not (self._waiting or self._running)

    def _are_proved(self) -> bool:
        """Whether all running suspects have run long enough for another to start."""
        now = time.monotonic()
        return all(proved_at <= now for proved_at in self._running.values())

    def _forget_exclusive(self, key: Key) -> None:
        if key == self._exclusive:
            self._exclusive = None
