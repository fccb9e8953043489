"""The keys by which jobs take turns."""

from __future__ import annotations

from ..job.redact import Redactor
from ..job.turns import MAX_FAIR_KEY
from ..options import JobOptions
from ..registry import Target
from .keys import Parameters, check_key_source, key_text, shortened


def check_fair(options: JobOptions, target: Target | None = None) -> None:
    """Check the option ``fair`` of a job.

    :param target: the callable, whose parameters the key must name; ``None``: not checked.
    :raises ValueError: says what is not valid.
    """
    if options.fair not in (None, False):
        check_key_source("fair", options.fair, target, or_else="False, ")


def fair_key(
    options: JobOptions, target: Target, parameters: Parameters, redactor: Redactor
) -> str | None:
    """The key of a job with these parameters; ``None`` if it takes no turns.

    :raises ValueError: when the key cannot be made from the parameters.
    """
    if options.fair is None or options.fair is False:
        return None
    return shortened(key_text("fair", options.fair, target, parameters, redactor), MAX_FAIR_KEY)
