"""The base class of all stores, composed of one class of statements per act.

Each database has a subclass with its clock, its claim and its insert that tolerates conflicts.
"""

from __future__ import annotations

from .statements.handover import Handovers
from .statements.lease import Leases
from .statements.limits import LimitRows
from .statements.manual import ByHand
from .statements.promote import Due
from .statements.prune import Prunes
from .statements.rollup import Rollups
from .statements.schedule import Schedules
from .statements.select import Selections
from .statements.waiting import Waiting
from .statements.weights import Weights


class Store(
    Handovers,
    Leases,
    Due,
    Prunes,
    Rollups,
    Selections,
    ByHand,
    Schedules,
    Waiting,
    LimitRows,
    Weights,
):
    """The statements on the tables of one app in one database.

    In the life of a job: insert, claim, mark_started and observe, settle, hand over. For workers:
    beat, rescue, promote, free, admit, fire, prune, and add to the roll-up. For people: pause and
    resume, cancel, retry, delete, each recorded in the audit trail. The store's own transactions
    are redone after errors that pass, such as a deadlock, a serialization failure or a busy
    database.
    """
