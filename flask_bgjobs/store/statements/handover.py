"""Hand over: record completed attempts, admit the jobs that waited for their seats, and claim jobs,
all in one transaction.

With a limit of a few jobs, a worker would otherwise need three transactions for these few.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from ...job.records import JobSpec, Outcome, Settled
from .admit import Admissions, is_use_old, may_swap
from .claim import Claims
from .limit_keys import Key
from .settle import Record, Recorded, Settles


class HandedOver(NamedTuple):
    """The result of :meth:`Handovers.hand_over`."""

    settled: list[Settled]
    """As :meth:`.Settles.complete` returns them."""
    specs: list[JobSpec] | None
    """The claimed jobs, in claim order; ``None``: no claim was made, because the outcomes had to be
    recorded one by one."""
    more: bool
    """Whether jobs may wait for a seat that is free."""


class Handovers(Claims, Admissions, Settles):
    """The statements that hand seats over."""

    def hand_over(
        self,
        worker_id: int,
        finished: Iterable[tuple[JobSpec, Outcome]],
        limit: int,
        queues: Sequence[str] | None = None,
        *,
        without: Collection[str] = (),
        suspects: bool = True,
    ) -> HandedOver:
        """Do the work of ``complete``, ``admit`` for the limits of these attempts, and ``claim``.

        :param limit: the number of jobs to claim. Like the following, as for ``claim``.
        """
        specs: list[JobSpec] = []
        more = True

        def work(connection: sa.Connection, record: Record) -> None:
            nonlocal more, specs
            # First, as in claim() and in a rescue of this worker, or they could deadlock.
            claimer = self.lock_claimer(connection, worker_id)
            passed, more = self._pass_seats_on(connection, record())
            specs = self.claim_for(claimer, connection, worker_id, limit, queues, without, suspects)
            # Somebody may have paused a limit meanwhile. Jobs that stay pending with a seat must
            # then give it back.
            unclaimed = passed.keys() - {spec.id for spec in specs}
            self.notice(connection, {passed[job_id]: () for job_id in unclaimed})

        settled, is_committed = self.complete_with(worker_id, finished, work)
        if not is_committed:
            return HandedOver(settled, None, more=True)
        self.note_queues(specs)
        return HandedOver(settled, specs, more)

    def _pass_seats_on(
        self, connection: sa.Connection, recorded: Recorded
    ) -> tuple[dict[int, int], bool]:
        """Admit jobs that wait for the seats of jobs that were running.

        :returns: the keys of jobs that have got a seat without a lock, by the ids of the jobs; and
            whether there may be more to admit.
        """
        freed = collections.Counter(use.key_id for each in recorded.leaving for use in each.uses)
        # After an edit by hand, jobs may have had fewer seats than their limits say.
        passable = freed if recorded.seats == freed.total() else {}
        keys = self.unlocked_keys(connection, sorted(passable)) if passable else {}
        passed, has_followers = self._pass_to_first(connection, keys, passable)
        done = {key.id for key in keys.values() if key.admitted == freed[key.id]}
        others = sorted(freed.keys() - done)
        locked = self.lock_existing_keys(connection, others)
        # A rate counts the starts in the notices.
        countable = {key_id: key for key_id, key in locked.items() if key.rule.rate is None}
        self.notice_left(connection, recorded.leaving, without=done | countable.keys())
        _, more = self.admit_at(connection, countable)
        return passed, more or has_followers or len(countable) < len(others)

    def _pass_to_first(
        self, connection: sa.Connection, keys: Mapping[int, Key], freed: Mapping[int, int]
    ) -> tuple[dict[int, int], bool]:
        """Give seats that this transaction has freed to jobs that wait.

        The keys need not be locked: for each seat that is freed, at most one is given, so the
        number of seats that are held does not grow.

        :param freed: the number of freed seats by key.
        :returns: as :meth:`.Admissions.fill`.
        """
        for key in keys.values():
            # Those left out need their row to be locked: to count starts, to take seats from
            # pending jobs, or to be written.
            needs_lock = key.rule.rate is not None or may_swap(key) or is_use_old(key)
            if not needs_lock and key.best_waiting is not None:
                key.room = int(max(0, min(freed[key.id], key.free_seats)))
        return self.fill(connection, keys)
