"""Look at the weights of keys and change them at run time, as ``bgjobs.weights``, the dashboard and
the command line do."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

from ...errors import InvalidJob
from ...job.text import shown, storable
from ...job.turns import DEFAULT_WEIGHT, MAX_FAIR_KEY, check_weight, is_weight
from ...models import Weight
from ...state import AppState
from ...store import Actor, KeyTurns


class WeightState:
    """The weight of a key, as it was when it was read."""

    def __init__(self, state: AppState, key: str, row: Weight | None) -> None:
        self._state = state
        self._row = row
        self.key = key
        """The key, such as the name of a tenant."""
        self.code: float = state.config.weights.get(key, DEFAULT_WEIGHT)
        """Its weight in the configuration of this process, or 1."""
        valid_row = row if row is not None and is_weight(row.weight) else None
        self.weight: float = self.code if valid_row is None else valid_row.weight
        """Its weight, which is the overridden one if there is one: how many of its jobs run in each
        turn."""

    @property
    def is_overridden(self) -> bool:
        """Whether its weight is overridden."""
        return self._row is not None

    @property
    def overridden_at(self) -> dt.datetime | None:
        """When it was last overridden, in UTC."""
        return None if self._row is None else self._row.overridden_at.replace(tzinfo=dt.UTC)

    @property
    def overridden_by(self) -> str | None:
        """Who overrode it last; ``None`` for the app's own code."""
        return None if self._row is None else self._row.overridden_by

    @property
    def has_changed_since_override(self) -> bool:
        """Whether its weight in the configuration has changed since it was overridden."""
        return self._row is not None and self._row.overridden_code != self.code

    def override(self, weight: float, by: Actor | None = None) -> WeightState:
        """Replace the weight until :meth:`reset`, on all workers.

        It acts on jobs that become due from then on, because the others have their turns already.

        :param weight: from 0.01 to 1,000.
        :param by: who overrides it, for the audit trail; ``None`` for the app's own code.
        :returns: the weight as it is now.
        :raises InvalidJob: when the weight is not valid.
        """
        try:
            number = check_weight(weight)
        except ValueError as error:
            raise InvalidJob(str(error)) from None
        self._state.store.override_weight(self.key, number, self.code, by)
        return self.refresh()

    def reset(self, by: Actor | None = None) -> WeightState:
        """Remove the override, so that the weight in the configuration applies.

        :param by: who resets it, for the audit trail; ``None`` for the app's own code.
        :returns: the weight as it is now.
        """
        self._state.store.reset_weight(self.key, by)
        return self.refresh()

    def refresh(self) -> WeightState:
        """The weight as it is now."""
        return find(self._state, self.key)

    def __repr__(self) -> str:
        return f"<WeightState {self.key} {self.weight:g}>"


class Weights:
    """The weights of keys of ``fair``. Each key has one, by default 1.

    As a collection, it holds the keys in ``BGJOBS_WEIGHTS`` and those that are overridden.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state

    def __getitem__(self, key: str) -> WeightState:
        """The weight of a key.

        :raises InvalidJob: when it is not a string of 1 to 255 characters.
        """
        return find(self._state, key)

    def all(self) -> list[WeightState]:
        """The weights that are configured or overridden, by key."""
        return list_weights(self._state)

    def waiting(self, number: int = 50) -> list[KeyTurns]:
        """The keys with jobs whose turn is still to come, those with the most turns first.

        :param number: how many at most. At most 20 queues are read, by name.
        """
        return self._state.store.keys_with_turns(number)

    def __contains__(self, key: str) -> bool:
        """Whether the weight of a key is configured or overridden."""
        return key in [each.key for each in self.all()]

    def __iter__(self) -> Iterator[str]:
        """The keys whose weight is configured or overridden, in order."""
        return iter([each.key for each in self.all()])

    def __len__(self) -> int:
        """How many weights are configured or overridden."""
        return len(self.all())


def list_weights(state: AppState) -> list[WeightState]:
    """The weights that are configured or overridden, by key."""
    rows = {row.name: row for row in state.store.read_weights()}
    keys = sorted({*rows, *state.config.weights})
    return [WeightState(state, key, rows.get(key)) for key in keys]


def find(state: AppState, key: str) -> WeightState:
    """The weight of a key.

    :raises InvalidJob: when it is not a string of 1 to 255 characters.
    """
    if not isinstance(key, str) or not 0 < len(key) <= MAX_FAIR_KEY:
        raise InvalidJob(f"a key is a str of 1 to {MAX_FAIR_KEY} characters, not {shown(key)}")
    key = storable(key)
    return WeightState(state, key, state.store.read_weight(key))
