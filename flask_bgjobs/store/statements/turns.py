"""Turns: give due jobs their turn among the keys that share a queue.

A worker does so when it promotes jobs, under the lock of the row of the queue and priority. The
claim then reads jobs in the order of their ranks, as always.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...job.turns import (
    DEFAULT_WEIGHT,
    MAX_TURN,
    Standing,
    TurnsSeen,
    claim_rank,
    fair_key_id,
    is_weight,
    queue_id,
    take_turn,
    weight_id,
)
from ...models import IS_OF_ANY_QUEUE, has_status
from ..database import FAIR_KEYS, FAIR_QUEUES, JOBS, WEIGHTS
from .seats import Seats

TURN_COLUMNS = (JOBS.c.id, JOBS.c.queue, JOBS.c.priority, JOBS.c.run_at, JOBS.c.fair_key)
"""The columns that :meth:`Turns.give_turns` needs."""
_RANK_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "job_id": sa.BigInteger(),
    "new_rank": sa.BigInteger(),
}
_UNUSED_SECONDS = 86_400.0
"""How long the rows of unused keys are kept."""


class Turns(Seats):
    """The statements on turns."""

    def give_turns(
        self, connection: sa.Connection, jobs: Sequence[Any], weights: Mapping[str, float]
    ) -> None:
        """Give each of the jobs a turn, in the order of their due times.

        :param jobs: rows with :data:`TURN_COLUMNS`. Their rows are locked.
        :param weights: the weights of keys in the configuration; those of others are 1.
        """
        if not jobs:
            return
        ordered = sorted(jobs, key=lambda job: (job.queue, job.priority, job.run_at, job.id))
        of_queues = [
            (*place, list(group))
            for place, group in itertools.groupby(ordered, lambda job: (job.queue, job.priority))
        ]
        # All workers lock the queues in the same order, so that they cannot deadlock.
        of_queues.sort(key=lambda entry: queue_id(entry[0], entry[1]))
        names = {job.fair_key for job in jobs}
        chosen = {name: weights.get(name, DEFAULT_WEIGHT) for name in names}
        chosen |= self._overridden_weights(connection, sorted(map(weight_id, names)))
        ranks: list[dict[str, int]] = []
        for queue, priority, members in of_queues:
            ranks += self._give_turns_in(connection, queue, priority, members, chosen)
        connection.execute(self._write_ranks, {"ranks": json.dumps(ranks)})

    def _give_turns_in(
        self,
        connection: sa.Connection,
        queue: str,
        priority: int,
        jobs: Sequence[Any],
        weights: Mapping[str, float],
    ) -> list[dict[str, int]]:
        """Give turns to jobs of one queue and priority.

        :returns: the rank of each.
        """
        standing = self._fair_standing(connection, queue, priority)
        key_ids = {job.fair_key: fair_key_id(queue, priority, job.fair_key) for job in jobs}
        known = sa.select(FAIR_KEYS.c.id, FAIR_KEYS.c.following, FAIR_KEYS.c.round)
        rows = connection.execute(known.where(FAIR_KEYS.c.id.in_(sorted(key_ids.values())))).all()
        current = {row.id: row.following for row in rows if row.round == standing.round}
        following = {name: current.get(key_id) for name, key_id in key_ids.items()}
        ranks = []
        for job in jobs:
            name = job.fair_key
            turn, following[name] = take_turn(standing, following[name], weights[name])
            ranks.append({"job_id": job.id, "new_rank": claim_rank(priority, turn)})
        ends = [
            {"key": key_id, "new_name": name, "end": following[name], "new_round": standing.round}
            for name, key_id in key_ids.items()
        ]
        here = queue_id(queue, priority)
        self._save_fair_keys(connection, here, ends, {row.id for row in rows})
        last = max(standing.last, *(each["end"] for each in ends))
        update = sa.update(FAIR_QUEUES).where(FAIR_QUEUES.c.id == here)
        connection.execute(update.values(standing._replace(last=last)._asdict()))
        return ranks

    def _fair_standing(self, connection: sa.Connection, queue: str, priority: int) -> Standing:
        """Lock the turns of a queue and priority, and find out which is the current one."""
        here = {"id": queue_id(queue, priority)}
        row = connection.execute(self._locked_fair_queue, here).first()
        if row is None:
            first = {**here, "queue": queue, "priority": priority}
            first |= Standing()._asdict()
            connection.execute(self._fair_queue_insertion, first)
            row = connection.execute(self._locked_fair_queue, here).one()
        lowest, highest = rank_range(priority)
        ranks = {"first": lowest, "last": highest, "here": queue}
        found = connection.execute(self._ranks_with_turn, ranks).one()
        return Standing(row.turn, row.last, row.round).at(turns_seen(found, priority))

    def _save_fair_keys(
        self,
        connection: sa.Connection,
        fair_queue_id: int,
        ends: Sequence[dict[str, Any]],
        stored: set[int],
    ) -> None:
        """Store where the turns of keys end."""
        rows = sorted(ends, key=lambda row: row["key"])
        if old := [row for row in rows if row["key"] in stored]:
            connection.execute(self._fair_key_update, old)
        if new := [{**row, "here": fair_queue_id} for row in rows if row["key"] not in stored]:
            connection.execute(self._fair_key_insertion, new)

    def _overridden_weights(
        self, connection: sa.Connection, ids: Sequence[int]
    ) -> dict[str, float]:
        """The weights that people have set, by key; those that are not valid are left out."""
        chosen = sa.select(WEIGHTS.c.name, WEIGHTS.c.weight).where(WEIGHTS.c.id.in_(ids))
        rows = connection.execute(chosen).all()
        return {row.name: row.weight for row in rows if is_weight(row.weight)}

    def prune_fair_keys(self, limit: int) -> int:
        """Delete up to ``limit`` rows of keys that no job has used for a day.

        :returns: the number of deleted rows.
        """
        unused = sa.select(FAIR_KEYS.c.id).where(
            FAIR_KEYS.c.used_at < self.after(sa.literal(-_UNUSED_SECONDS))
        )

        def work(connection: sa.Connection) -> int:
            ids = sorted(connection.scalars(unused.limit(limit)))
            if ids:
                connection.execute(sa.delete(FAIR_KEYS).where(FAIR_KEYS.c.id.in_(ids)))
            return len(ids)

        return self.transaction(work)

    @functools.cached_property
    def _locked_fair_queue(self) -> sa.Select[Any]:
        row = sa.select(FAIR_QUEUES.c.turn, FAIR_QUEUES.c.last, FAIR_QUEUES.c.round)
        return row.where(FAIR_QUEUES.c.id == sa.bindparam("id")).with_for_update()

    @functools.cached_property
    def _fair_queue_insertion(self) -> Any:
        return self.ignoring_duplicates(self.insert_into(FAIR_QUEUES), FAIR_QUEUES.c.id)

    @functools.cached_property
    def _ranks_with_turn(self) -> sa.Select[Any]:
        first, last = (sa.bindparam(name, type_=sa.BigInteger) for name in ("first", "last"))
        here = sa.bindparam("here", type_=sa.String)
        return sa.select(*ranks_with_turn(here, first, last))

    @functools.cached_property
    def _fair_key_update(self) -> sa.Update:
        update = sa.update(FAIR_KEYS).where(FAIR_KEYS.c.id == sa.bindparam("key"))
        return update.values(
            following=sa.bindparam("end"), round=sa.bindparam("new_round"), used_at=self.now
        )

    @functools.cached_property
    def _fair_key_insertion(self) -> sa.Insert:
        return sa.insert(FAIR_KEYS).values(
            id=sa.bindparam("key"),
            fair_queue_id=sa.bindparam("here"),
            name=sa.bindparam("new_name"),
            following=sa.bindparam("end"),
            round=sa.bindparam("new_round"),
            used_at=self.now,
        )

    @functools.cached_property
    def _write_ranks(self) -> sa.Update:
        given = self.json_rows(sa.bindparam("ranks", type_=sa.Text), _RANK_TYPES).c
        update = sa.update(JOBS).where(JOBS.c.id == given.job_id)
        return update.values(claim_rank=given.new_rank)


def rank_range(priority: int) -> tuple[int, int]:
    """The first and the last claim rank of jobs of a priority that have a turn."""
    return claim_rank(priority, 1), claim_rank(priority, MAX_TURN)


def ranks_with_turn(
    queue: sa.ColumnElement[str], first: sa.ColumnElement[int], last: sa.ColumnElement[int]
) -> list[sa.ScalarSelect[Any]]:
    """SQL expressions for the claim ranks from ``first`` to ``last`` that :func:`turns_seen`
    needs."""
    here = JOBS.c.queue == queue
    anywhere = sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean)
    lowest, highest = sa.func.min(JOBS.c.claim_rank), sa.func.max(JOBS.c.claim_rank)
    ranks = {
        "running": sa.select(highest).where(has_status(JobStatus.RUNNING), here),
        "pending": sa.select(lowest).where(has_status(JobStatus.PENDING), here),
        "waiting": sa.select(lowest).where(has_status(JobStatus.WAITING), here),
        "elsewhere": sa.select(lowest).where(has_status(JobStatus.PENDING), anywhere),
    }
    have_turns = JOBS.c.claim_rank >= first, JOBS.c.claim_rank <= last
    return [ranks[name].where(*have_turns).scalar_subquery() for name in TurnsSeen._fields]


def turns_seen(ranks: Iterable[int | None], priority: int) -> TurnsSeen:
    """The turns of the claim ranks that :func:`ranks_with_turn` has found."""
    return TurnsSeen(*(None if r is None else r - claim_rank(priority) for r in ranks))
