"""A session: all contenders are measured in turn, so that ratios hold on a busy machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import machine
from .contender import Contender
from .figures import medians
from .measure import Measure, Scale
from .results import Results
from .stores import Stores, Unavailable

Say = Callable[[str], object]


class Session:
    """Measures, and keeps what comes out as it comes.

    :param scale: how much is done for a figure.
    :param say: told what is going on.
    :param keep: given the results so far after each run.
    """

    def __init__(self, scale: Scale, say: Say, keep: Callable[[Results], object]) -> None:
        self._scale = scale
        self._say = say
        self._keep = keep
        self._stores = Stores()
        self._results = Results(machine.describe(), machine.package_versions())

    def hold(
        self, contenders: Sequence[type[Contender]], measures: Sequence[Measure], runs: int
    ) -> Results:
        """The results of so many rounds; in each all contenders are measured in turn."""
        with self._stores:
            able = [contender for contender in contenders if self._is_able(contender)]
            for measure in measures:
                suited = [contender for contender in able if measure.suits(contender)]
                for number in range(1, min(runs, measure.most_runs) + 1):
                    for contender in suited:
                        self._say(f"{measure.name}, run {number}: {contender.name} ...")
                        self._measure(contender, measure)
        return self._results

    def _is_able(self, contender: type[Contender]) -> bool:
        reason = contender.unavailable()
        if reason is None:
            try:
                store = self._stores.get(contender.store)
                self._results.versions[store.title] = store.version()
                return True
            except Unavailable as error:
                reason = str(error)
        self._results.skipped[contender.name] = reason
        self._say(f"{contender.name} is skipped: {reason}")
        return False

    def _measure(self, contender: type[Contender], measure: Measure) -> None:
        entry = self._results.entry(measure.name, contender.name)
        if entry.failure is not None:
            return
        try:
            figures = measure.run(contender, self._stores, self._scale)
        except Exception as error:
            # Also what a client library raises: the others are measured all the same.
            entry.failure = str(error) or repr(error)
            self._say(f"FAILED: {entry.failure}")
        else:
            entry.runs.append(figures)
            self._say(", ".join(f"{k} {v:,.4g}" for k, v in medians([figures]).items()))
        self._keep(self._results)
