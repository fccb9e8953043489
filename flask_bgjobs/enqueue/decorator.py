"""Job functions, which ``@bgjobs.job`` returns: callable as before, with an ``enqueue`` method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, Unpack

from ..errors import InvalidJob
from ..job.redact import signature_text
from ..models import Job
from ..options import JobOptions, OptionValues, options_from
from ..state import current_state
from .calls import Call
from .enqueue import AUTO, Parameters, SessionChoice, enqueue, hint_at_options

P = ParamSpec("P")
R = TypeVar("R")

_OTHER_NAMES = {
    "apply_async": "using(…).enqueue(…)",
    "defer": "enqueue(…)",
    "defer_async": "enqueue(…)",
    "delay": "enqueue(…)",
    "enqueue_at": "using(run_at=…).enqueue(…)",
    "enqueue_in": "using(delay=…).enqueue(…)",
    "queue": "enqueue(…)",
    "s": "call(…)",
    "schedule": "using(run_at=…).enqueue(…)",
    "send": "enqueue(…)",
    "send_with_options": "using(…).enqueue(…)",
    "set": "using(…)",
    "si": "call(…)",
    "signature": "call(…)",
}
"""Method names of other job queues, and what to call instead."""


class JobFunction(Generic[P, R]):
    """A function that can be run in the background. A plain call runs it at once, in the caller."""

    def __init__(self, function: Callable[P, R], name: str) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.job_name = name
        """The name of the function in stored jobs."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function directly, and return its result."""
        return self._function(*args, **kwargs)

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Enqueue a job that runs the function with these arguments, and return it.

        :raises InvalidJob: when an argument cannot be stored.
        """
        return self.using().enqueue(*args, **kwargs)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """A job that runs the function with these arguments, and is not enqueued yet.

        :raises InvalidJob: when positional and keyword arguments are mixed and do not fit the
            function. Everything else is checked when the job is enqueued.
        """
        return self.using().call(*args, **kwargs)

    def using(
        self, *, session: SessionChoice = AUTO, **options: Unpack[OptionValues]
    ) -> BoundJob[P]:
        """The function with other options, ready to be enqueued.

        :param session: as in :func:`~flask_bgjobs.run_background_job`.
        :param options: fields of :class:`~flask_bgjobs.options.JobOptions`. Missing options keep
            the values of the decorator.
        :raises TypeError: for an option that does not exist.
        """
        return BoundJob(self.job_name, options_from(options), session)

    if not TYPE_CHECKING:
        # Hidden from type checkers, so that an unknown attribute remains an error for them.
        def __getattr__(self, name: str) -> NoReturn:
            hint = f": did you mean {_OTHER_NAMES[name]}?" if name in _OTHER_NAMES else ""
            raise AttributeError(f"a job function has no {name}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        return f"<job {self.job_name}>"


class BoundJob(Generic[P]):
    """A job function with options, ready to be enqueued."""

    def __init__(self, name: str, options: JobOptions, session: SessionChoice) -> None:
        self._name = name
        self._options = options
        self._session = session

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Enqueue a job that runs the function with these arguments, and return it.

        :raises InvalidJob: when an argument or option cannot be stored.
        """
        return self.enqueue_many([_stored_arguments(self._name, args, kwargs)])[0]

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """A job that runs the function with these arguments, and is not enqueued yet.

        :raises InvalidJob: as :meth:`JobFunction.call`; also when ``using`` was given a session,
            because the session is chosen when the job is enqueued.
        """
        if self._session is not AUTO:
            raise InvalidJob(
                "a call has no session: pass it to enqueue_many(…, session=…) or "
                "call(…).enqueue(session=…)"
            )
        return Call(self._name, None, _stored_arguments(self._name, args, kwargs), self._options)

    def within(self, session: SessionChoice) -> BoundJob[P]:
        """The same function and options, with another session."""
        return BoundJob(self._name, self._options, session)

    def enqueue_many(self, parameter_sets: Sequence[Parameters]) -> list[Job]:
        """Enqueue one job per set of parameters in one transaction, and return them in order."""
        return enqueue(
            current_state(), self._name, None, parameter_sets, self._options, self._session
        )


def _stored_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Parameters:
    """The arguments of a call in the form in which they are stored: a list or a dict.

    :raises InvalidJob: when the arguments do not fit the function, or when positional and keyword
        arguments are mixed for a function whose arguments cannot all be given by keyword.
    """
    if not kwargs:
        return list(args)
    if not args:
        return dict(kwargs)
    signature = current_state().registry.resolve(name).signature
    wanted = f"{name}{signature_text(signature)}"
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidJob(
            f"the parameters do not fit {wanted}: {error}{hint_at_options(signature, kwargs)}"
        ) from None
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise InvalidJob(
                f"{wanted} was given positional and keyword parameters, which are stored as one "
                f"dict; it cannot hold *{parameter.name} or positional-only parameters"
            )
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    by_name = dict(bound.arguments)
    return by_name | by_name.pop(extra, {}) if extra else by_name
