"""The jobs that a worker claims: how many, for which pool, and which are given back at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy.exc import DBAPIError

from ..job.limits import has_rate
from ..job.records import JobSpec, Key, Outcome, Settled
from ..job.row_check import bad_row, checked
from ..store import HandedOver, Store
from . import shutdown
from .outbox import Outbox
from .routing import RoutedPool, WorkerPools
from .suspects import Suspects

_NO_HANDOVER_SECONDS = 10.0
"""How long seats are not handed over after an error. Outcomes are then recorded by themselves."""


class Claims:
    """Claims jobs for the pools of one worker, and starts suspects when it is their turn.

    :param outbox: gets the outcomes of jobs that are not started.
    :param max_jobs: most jobs to claim in total; ``None``: no limit.
    """

    def __init__(self, store: Store, outbox: Outbox, *, max_jobs: int | None) -> None:
        self.suspects = Suspects()
        self.total = 0
        """Number of jobs claimed so far, without those that were given back at once."""
        self._store = store
        self._outbox = outbox
        self._max_jobs = max_jobs
        self._held: set[Key] = set()
        """Claimed attempts whose outcome is not recorded yet."""
        self._is_in_doubt = False
        """Whether the last claim may have been committed without a reply."""
        self._no_handover_until = -math.inf

    @property
    def has_reached_limit(self) -> bool:
        """Whether no more jobs may be claimed."""
        return self._max_jobs is not None and self.total >= self._max_jobs

    def room(self, routed: RoutedPool) -> int:
        """Number of jobs to claim for a pool; suspects that wait for their turn count as well."""
        waiting = sum(routed.route.serves(spec.queue) for spec in self.suspects)
        if waiting and self.suspects.may_start_one(routed.route.serves):
            # Reserve the next free thread or child process for a suspect: none may ever be free
            # for it otherwise.
            return 0
        room = routed.room() - waiting
        return room if self._max_jobs is None else min(room, self._max_jobs - self.total)

    def take(self, worker_id: int, routed: RoutedPool, room: int) -> bool:
        """Claim up to ``room`` jobs for a pool, and submit those that may start.

        :returns: whether any were claimed.
        """
        route = routed.route
        self._is_in_doubt = True
        began = time.monotonic()
        specs = self._store.claim(
            worker_id,
            room,
            route.queues,
            without=route.excluded,
            suspects=self.suspects.may_claim,
        )
        self._accept(specs, routed, room, began)
        return bool(specs)

    def may_hand_over(self) -> bool:
        """Whether :meth:`hand_over` may be used now."""
        return not self._is_in_doubt and time.monotonic() >= self._no_handover_until

    def hand_over(
        self,
        worker_id: int,
        routed: RoutedPool,
        room: int,
        note: Callable[[Settled], object],
    ) -> bool:
        """Record completed attempts of jobs with limits, admit those that wait for their seats, and
        claim up to ``room`` jobs for a pool, in one transaction.

        :param note: called with each recorded outcome.
        :returns: whether jobs may wait for a seat that is free.
        """
        route = routed.route
        handed = HandedOver([], None, more=True)

        def complete(batch: Sequence[tuple[JobSpec, Outcome]]) -> list[Settled]:
            nonlocal handed
            handed = self._store.hand_over(
                worker_id,
                batch,
                room,
                route.queues,
                without=route.excluded,
                suspects=self.suspects.may_claim,
            )
            return handed.settled

        self._is_in_doubt = True
        began = time.monotonic()
        try:
            settled = self._outbox.record_by(complete)
        except DBAPIError:
            # Whatever it was, it must not keep the outcomes from being recorded.
            self._no_handover_until = time.monotonic() + _NO_HANDOVER_SECONDS
            raise
        try:
            if handed.specs is None:
                self._is_in_doubt = False
            else:
                self._accept(handed.specs, routed, room, began)
        finally:
            for each in settled:
                note(each)
        return handed.more

    def _accept(
        self, specs: Sequence[JobSpec], routed: RoutedPool, room: int, began: float
    ) -> None:
        """Submit claimed jobs to a pool, if they may start.

        :param began: when the claim began, by ``time.monotonic()``.
        """
        suspects = [spec for spec in specs if spec.suspect]
        # The claim is still in doubt, so its jobs are given back if this query fails.
        exclusive = self._store.lost_among_others(suspects) if suspects else ()
        self._is_in_doubt = False
        self._held |= {spec.key for spec in specs}
        claimed = time.monotonic()
        routed.expects_jobs = len(specs) == room
        good = self._without_bad_rows(specs)
        refused = [
            spec
            for spec in good
            if spec.suspect
            and not self.suspects.add(spec, is_exclusive=spec.id in exclusive, claimed=claimed)
        ]
        self._give_back(refused)
        self.total += len(specs) - len(refused)
        usual = [spec for spec in good if not spec.suspect]
        rated = [s for s in usual if s.limits_json is not None and has_rate(s.limits_json)]
        if rated:
            # Rate limits count recorded starts. These must not be earlier than the real ones.
            routed.submit(rated, began)
            usual = [spec for spec in usual if spec not in rated]
        routed.submit(usual, claimed)

    def start_suspects(self, worker_id: int, pools: WorkerPools) -> bool:
        """Start the suspects whose turn it is, each start committed before its code runs.

        :returns: whether the worker has lost one of them, so that it has to poll again.
        """
        has_lost_one = False
        # Only suspects that begin at once: with a committed start, a suspect that still waits in
        # its pool could be blamed for a crash although its code never ran.
        while spec := self.suspects.next(pools.can_begin, pools.has_own_process):
            started = self._store.mark_started(worker_id, [spec])
            claimed = self.suspects.claimed_at(spec)
            # Removed only after the commit: during an outage the suspect keeps waiting.
            self.suspects.remove(spec)
            if spec.id in started.locked:
                # Its start cannot be committed, and other suspects must not wait for that.
                self._give_back([spec])
            elif spec.id in started.ours:
                own = pools.has_own_process(spec)
                self.suspects.note_start(spec, has_own_process=own)
                pools.submit(spec, claimed)
            else:
                # Another worker took the lease, so this attempt will have no outcome.
                self._held.discard(spec.key)
                self.suspects.note_end(spec.key)
                has_lost_one = True
        return has_lost_one

    def give_back_unseen(self, worker_id: int, settle: Callable[[], None]) -> None:
        """Give back the jobs of a claim that may have been committed without a reply.

        :param settle: records the outcomes in the outbox.
        """
        if not self._is_in_doubt:
            return
        held = self._store.held_by(worker_id)
        self._give_back(spec for spec in held if spec.key not in self._held)
        settle()
        self._is_in_doubt = False

    def note_end(self, spec: JobSpec) -> bool:
        """Note that the outcome of a job was recorded.

        :returns: whether suspects may be claimed again because of it.
        """
        self._held.discard(spec.key)
        return spec.suspect and self.suspects.note_end(spec.key)

    def forget(self, unstarted: Iterable[JobSpec]) -> None:
        """Forget all jobs, because another worker has taken them.

        :param unstarted: those that had not started. They will have no outcome.
        """
        for spec in unstarted:
            self.suspects.note_end(spec.key)
        self.suspects.take_waiting()
        self._held.clear()

    def _without_bad_rows(self, specs: Sequence[JobSpec]) -> list[JobSpec]:
        """The jobs whose rows are valid. The others fail without being started."""
        good = []
        for claimed in specs:
            spec, flaw = checked(claimed)
            if flaw is None:
                good.append(spec)
            else:
                self._outbox.put(spec, bad_row(spec, flaw))
        return good

    def _give_back(self, specs: Iterable[JobSpec]) -> None:
        for spec in specs:
            self._outbox.put(spec, shutdown.given_back(spec))
