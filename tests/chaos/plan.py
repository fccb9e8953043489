"""The plan: which jobs are enqueued, how, and the outcome that each must have."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

from flask_bgjobs import JobStatus

from .limits import draw_fairness, draw_limits

How = Literal["saved at once", "joined and committed", "joined and rolled back"]

_HOW: dict[How, int] = {
    "saved at once": 60,
    "joined and committed": 25,
    "joined and rolled back": 15,
}
_CANCELLED_SHARE = 0.08
_HIGH_SHARE = 0.1
"""With more jobs of high priority, the others might wait until chaos ends, which is no error."""
_LATEST_CANCEL_SECONDS = 2.0
_POISON_EVERY, _FIRST_POISON = 400, 50
"""In jobs: each poison job kills some workers, and their other jobs start again."""
_UNIQUE_KEYS = 20

Drawn = tuple[list[Any], dict[str, Any]]
"""Additional parameters and options of a job."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job."""

    name: str
    weight: float
    """How often it is drawn, relative to the other kinds."""
    function: str
    status: JobStatus
    """Its final status unless it is cancelled."""
    retries_used: int = 0
    draw: Callable[[random.Random], Drawn] = lambda _: ([], {})


def _retries(number: int, **options: Any) -> Callable[[random.Random], Drawn]:
    return lambda _: ([], {"retries": number, "retry_delay": 0.1, **options})


_DONE, _FAILED = JobStatus.COMPLETED, JobStatus.FAILED
_KINDS = (
    Kind("quick", 40, "quick", _DONE),
    Kind("sleeping", 12, "sleeps", _DONE, draw=lambda r: ([r.uniform(0.2, 2)], {})),
    Kind("async", 6, "waits", _DONE, draw=lambda r: ([r.uniform(0.01, 0.5)], {})),
    Kind("failing once", 8, "fails_once", _DONE, 1, _retries(2)),
    Kind("failing", 5, "fails", _FAILED, 2, _retries(2, jitter=0.5)),
    Kind("giving up", 3, "gives_up", _FAILED),
    Kind("asking Retry", 4, "asks_retry", _DONE, 1, _retries(1)),
    Kind("snoozing", 4, "snoozes", _DONE),
    Kind(
        "overdue",
        3,
        "sleeps",
        _FAILED,
        1,
        lambda _: ([60], {"timeout": 0.3, "retries": 1, "retry_delay": 0.1}),
    ),
    Kind("delayed", 8, "quick", _DONE, draw=lambda r: ([], {"delay": r.uniform(0.1, 3)})),
    Kind(
        "unique",
        6,
        "sleeps",
        _DONE,
        draw=lambda r: ([0.05], {"unique_key": f"key-{r.randrange(_UNIQUE_KEYS)}"}),
    ),
    Kind("killing once", 0.5, "kills_once", _DONE),
    Kind("forking", 3, "forks", _DONE),
    Kind("with helpers", 1, "uses_helpers", _DONE),
    Kind("locking", 3, "locks_its_row", _DONE, draw=lambda r: ([r.uniform(0.1, 1)], {})),
    Kind("returning much", 2, "returns_much", _DONE),
)
_POISON = Kind("poison", 0, "poison", _FAILED)


@dataclasses.dataclass(slots=True)
class Planned:
    """A job of the plan, and what the harness knows about it."""

    token: int
    """The harness's number for the job."""
    kind: Kind
    how: How
    parameters: list[Any]
    options: dict[str, Any]
    cancel_after: float | None
    """Seconds after the enqueue; ``None`` if the job is not cancelled."""
    result: Literal["in doubt", "enqueued", "rolled back", "deduplicated"] = "in doubt"
    """The result of the enqueue; in doubt if it raised."""
    job_id: int | None = None
    cancel_asked: bool = False

    @property
    def is_poison(self) -> bool:
        """Whether it kills its process every time."""
        return self.kind is _POISON


class Plan:
    """Draws jobs; the same seed gives the same jobs in the same order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"plan {seed}")
        self._next_token = 1

    def draw(self) -> Planned:
        """The next job."""
        token, self._next_token = self._next_token, self._next_token + 1
        (kind,) = self._random.choices(_KINDS, [kind.weight for kind in _KINDS])
        (how,) = self._random.choices(list(_HOW), list(_HOW.values()))
        is_cancelled = self._random.random() < _CANCELLED_SHARE
        cancel_after = self._random.uniform(0, _LATEST_CANCEL_SECONDS)
        priority = "high" if self._random.random() < _HIGH_SHARE else "low"
        if token % _POISON_EVERY == _FIRST_POISON:
            kind, how, is_cancelled = _POISON, "saved at once", False
        parameters, options = kind.draw(self._random)
        return Planned(
            token,
            kind,
            how,
            [token, *parameters],
            {
                "priority": priority,
                # The token is also the owner, so that it is found without reading parameters.
                "owner": str(token),
                **options,
                **draw_limits(self._random),
                **draw_fairness(self._random),
            },
            cancel_after if is_cancelled else None,
        )
