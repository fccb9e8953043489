"""Suspects: jobs whose last worker died with them, one of which may have killed it.

Most are innocent, and a poison job usually kills its process at once. So suspects start one after
the other, each with its start committed before its code runs, and the next one when the last has
ended or has run for half a second. When the worker dies while only one of them runs, that one is
proved to have crashed it. When several run, none is blamed, and each of them is exclusive next
time: it runs with no other suspect beside it. A worker keeps one exclusive suspect at most. While
it has one, it keeps no other suspects: other workers may be free for them.

In a process pool they start at once: there a crash ends the child of one job alone.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator

from ..job.records import JobSpec, Key

_PROVING_SECONDS = 0.5
"""How long a suspect runs before the next one may start beside it."""


class Suspects:
    """The suspects that a worker has claimed."""

    def __init__(self) -> None:
        self._waiting: collections.deque[JobSpec] = collections.deque()
        self._claimed_at: dict[Key, float] = {}
        self._exclusive: Key | None = None
        """The one that runs with no other suspect beside it."""
        self._has_refused = False
        """Whether an exclusive one would have waited for those that are here."""
        self._running: dict[Key, float] = {}
        """When the next suspect may start beside it, by ``time.monotonic()``."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[JobSpec]:
        return iter(self._waiting)

    @property
    def may_claim(self) -> bool:
        """Whether suspects may be claimed: :meth:`add` would take any of them."""
        return self._exclusive is None and (self._is_empty or not self._has_refused)

    def claimed_at(self, spec: JobSpec) -> float:
        """When a suspect that waits was claimed, by ``time.monotonic()``."""
        return self._claimed_at[spec.key]

    def add(self, spec: JobSpec, *, is_exclusive: bool, claimed: float) -> bool:
        """Let a suspect wait for its turn. ``False``: it must be given back, because it would have
        to wait: for the exclusive one that is here or, if it is exclusive itself, for the others.

        :param is_exclusive: whether no other suspect may run beside it.
        :param claimed: when it was claimed, by ``time.monotonic()``.
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
        """The suspect to start now, if there is one; it waits until it is removed.

        :param can_begin: whether a job would begin at once, were it submitted.
        :param has_own_process: whether it runs in a process that runs nothing else.
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
        """Whether a suspect of the queues that are served only waits for a free place."""
        return self._are_proved() and any(serves(spec.queue) for spec in self._waiting)

    def remove(self, spec: JobSpec) -> None:
        """Let a suspect wait no longer."""
        self._waiting.remove(spec)
        del self._claimed_at[spec.key]

    def note_start(self, spec: JobSpec, *, has_own_process: bool) -> None:
        """Note that a suspect begins."""
        proved_at = -math.inf if has_own_process else time.monotonic() + _PROVING_SECONDS
        self._running[spec.key] = proved_at

    def note_end(self, key: Key) -> bool:
        """Note that an attempt has ended, if it is that of a suspect. ``True``: suspects may be
        claimed again."""
        could_claim = self.may_claim
        self._running.pop(key, None)
        self._forget_exclusive(key)
        return self.may_claim and not could_claim

    def take_waiting(self) -> list[JobSpec]:
        """Those that wait; they will not be run here."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._claimed_at.clear()
        for spec in taken:
            self._forget_exclusive(spec.key)
        return taken

    def seconds_until_next(self) -> float:
        """How long the one that started last keeps others waiting; infinite where it does not."""
        proved_at = max(self._running.values(), default=-math.inf)
        left = proved_at - time.monotonic()
        return left if self._waiting and left > 0 else math.inf

    @property
    def _is_empty(self) -> bool:
        return not (self._waiting or self._running)

    def _are_proved(self) -> bool:
        """Whether another one may start beside those that run."""
        now = time.monotonic()
        return all(proved_at <= now for proved_at in self._running.values())

    def _forget_exclusive(self, key: Key) -> None:
        if key == self._exclusive:
            self._exclusive = None
