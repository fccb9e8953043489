"""The limits in the code of this process: those of decorated functions and in ``BGJOBS_LIMITS``."""

from __future__ import annotations

from ...enqueue.limits import limits_of
from ...errors import ConfigError
from ...job.limits import Rule
from ...state import AppState


def rules(state: AppState) -> dict[str, Rule]:
    """The rule of each limit, by name.

    :raises ConfigError: when two limits with the same name have different rules, or a function
        names a limit that ``BGJOBS_LIMITS`` does not have.
    """
    found = {name: entry.limit.rule for name, entry in state.config.limits.items()}
    for job_name, options in state.registry.all_options().items():
        try:
            limits = limits_of(state.config, options, job_name, None)
        except ValueError as error:
            raise ConfigError(f"@bgjobs.job of {job_name}: {error}") from None
        for limit in limits:
            assert limit.name is not None
            known = found.setdefault(limit.name, limit.rule)
            if known != limit.rule:
                raise ConfigError(
                    f"two limits are named {limit.name!r}: one allows {known.in_words()}, the "
                    f"other, of {job_name}, {limit.rule.in_words()}. Give both the same numbers, "
                    "or one another name"
                )
    return found
