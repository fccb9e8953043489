"""The contract of a store: every statement that changes a row, an act a file.

A subclass per dialect supplies the clock, the claim and the tolerant insert.
"""

from __future__ import annotations

from .statements.claim import Claims
from .statements.enqueue import Inserts
from .statements.lease import Leases
from .statements.manual import ByHand
from .statements.promote import Due
from .statements.prune import Prunes
from .statements.rollup import Rollups
from .statements.select import Selections


class Store(Inserts, Claims, Leases, Due, Prunes, Rollups, Selections, ByHand):
    """The statements of one app's tables on one database, in the order of a job's life:

    insert (1), claim (2), mark_started and observe (3), settle (4); beat and rescue; promote;
    prune; add to the roll-up; and by hand pause and resume, cancel, retry, delete, each written
    down in the audit trail. Transactions of its own are redone when the database asks for it
    (deadlock, serialization failure, busy).
    """
