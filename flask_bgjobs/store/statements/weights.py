"""Weights of keys: override them, and read which keys have jobs whose turn is still to come."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa

from ...job.turns import Standing, weight_id
from ...models import Weight
from ..database import FAIR_KEYS, FAIR_QUEUES, WEIGHTS
from .audit import Actor, Audits
from .turns import Turns, rank_range, ranks_with_turn, turns_seen

_READ_QUEUES = 20
"""Most queues whose keys are read."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeyTurns:
    """A key whose jobs have turns that are still to come."""

    key: str
    queue: str
    priority: int
    turns: float
    """Number of turns from the current one to that of its last job. In each of them, the key runs
    as many jobs as its weight."""


class Weights(Turns, Audits):
    """The statements on the weights of keys."""

    def read_weights(self) -> list[Weight]:
        """The overridden weights, by key."""
        with self.read() as connection:
            rows = connection.execute(sa.select(WEIGHTS).order_by(WEIGHTS.c.name)).mappings()
            return [_weight_row(row) for row in rows]

    def read_weight(self, key: str) -> Weight | None:
        """The overridden weight of a key; ``None`` if it is not overridden."""
        mine = sa.select(WEIGHTS).where(WEIGHTS.c.id == weight_id(key))
        with self.read() as connection:
            row = connection.execute(mine).mappings().first()
        return None if row is None else _weight_row(row)

    def override_weight(self, key: str, weight: float, code: float, by: Actor | None) -> None:
        """Override the weight of a key, for jobs that become due from now on.

        :param code: its weight in the configuration.
        """
        values = {
            "name": key,
            "weight": weight,
            "overridden_at": self.now,
            "overridden_by": None if by is None else by.name[:255],
            "overridden_code": code,
        }

        def work(connection: sa.Connection) -> None:
            insert = self.insert_into(WEIGHTS).values(id=weight_id(key), **values)
            connection.execute(self.ignoring_duplicates(insert, WEIGHTS.c.id))
            update = sa.update(WEIGHTS).where(WEIGHTS.c.id == weight_id(key))
            connection.execute(update.values(**values))
            self.audit(connection, by, "edit weight", subject=key)

        self.transaction(work)

    def reset_weight(self, key: str, by: Actor | None) -> bool:
        """Remove the override of a key.

        :returns: whether there was one.
        """

        def work(connection: sa.Connection) -> bool:
            delete = sa.delete(WEIGHTS).where(WEIGHTS.c.id == weight_id(key))
            if not connection.execute(delete).rowcount:
                return False
            self.audit(connection, by, "reset weight", subject=key)
            return True

        return self.transaction(work)

    def keys_with_turns(self, number: int) -> list[KeyTurns]:
        """The keys with jobs whose turn is still to come, those with the most turns first.

        :param number: how many at most. At most 20 queues are read, by name.
        """
        ahead = FAIR_QUEUES.c.last > FAIR_QUEUES.c.turn
        order = FAIR_QUEUES.c.queue, FAIR_QUEUES.c.priority.desc()
        chosen = sa.select(FAIR_QUEUES).where(ahead).order_by(*order).limit(_READ_QUEUES)
        with self.read() as connection:
            queues = {row.id: row for row in connection.execute(chosen)}
            if not queues:
                return []
            seen = connection.execute(sa.union_all(*map(_ranks_of, queues.values())))
            standings = {row[0]: _standing(queues[row[0]], row[1:]) for row in seen}
            busy = [
                sa.select(some.c.fair_queue_id, some.c.name, some.c.following)
                for id_, standing in standings.items()
                for some in [_keys_after(id_, standing).limit(number).subquery()]
            ]
            keys = connection.execute(sa.union_all(*busy)).all()
        found = [_key_turns(queues[id_], standings[id_], *rest) for id_, *rest in keys]
        return sorted(found, key=lambda each: (-each.turns, each.key))[:number]


def _ranks_of(queue: Any) -> sa.Select[Any]:
    """The query for the claim ranks in a queue that have turns, after its id."""
    first, last = (sa.literal(rank, sa.BigInteger) for rank in rank_range(queue.priority))
    ranks = ranks_with_turn(sa.literal(queue.queue, sa.String), first, last)
    return sa.select(sa.literal(queue.id, sa.BigInteger), *ranks)


def _standing(queue: Any, ranks: Any) -> Standing:
    """Where a queue is in its turns now."""
    return Standing(queue.turn, queue.last, queue.round).at(turns_seen(ranks, queue.priority))


def _keys_after(queue_id: int, standing: Standing) -> sa.Select[Any]:
    """The keys of a queue with turns after the current one, those with the most first."""
    mine = FAIR_KEYS.c.fair_queue_id == queue_id, FAIR_KEYS.c.following > standing.turn
    keys = sa.select(FAIR_KEYS).where(*mine, FAIR_KEYS.c.round == standing.round)
    return keys.order_by(FAIR_KEYS.c.following.desc(), FAIR_KEYS.c.id.desc())


def _key_turns(queue: Any, standing: Standing, name: str, following: float) -> KeyTurns:
    return KeyTurns(name, queue.queue, queue.priority, following - standing.turn)


def _weight_row(row: Any) -> Weight:
    return Weight(**{column.name: row[column.name] for column in WEIGHTS.c})
