"""A logger that never raises, even if a filter or handler fails.

Hosts add filters and handlers that read ``flask.g`` or call a service. In a worker, these run in
threads without a request or application context. An exception from one of them would end the
heartbeat or the scheduler.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class Raised(NamedTuple):
    """The exception of a log record."""

    error: BaseException
    frames: TracebackType | None
    """The part of the traceback that the record shows."""
    text: str
    """The traceback as text."""


class SafeLogger(_Adapter):
    """Logs through another logger, and never raises.

    An exception from a filter, a handler or a record factory is printed to ``sys.stderr``, as by
    :meth:`logging.Handler.handleError`, unless ``logging.raiseExceptions`` is false.

    :param stays_enabled: whether :func:`logging.config.dictConfig` and ``fileConfig``, which
        Alembic calls, cannot disable the logger. Its level can still silence it.
    :param least_level: records below this level are not logged.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        stays_enabled: bool = False,
        least_level: int = logging.NOTSET,
    ) -> None:
        super().__init__(logger, None)
        self._stays_enabled = stays_enabled
        self._least_level = least_level

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  # logging's name for it
        """Whether a record of ``level`` would be logged."""
        if self._stays_enabled and self.logger.disabled:
            # By default, dictConfig() and fileConfig() disable existing loggers they do not name.
            self.logger.disabled = False
        return level >= self._least_level and super().isEnabledFor(level)

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a record that shows the position of the caller."""
        # Skip the frame of this method as well.
        stacklevel = kwargs.pop("stacklevel", 1) + 1
        try:
            super().log(level, msg, *args, stacklevel=stacklevel, **kwargs)
        except Exception:
            _print_exception(self.logger.name)

    def write(
        self,
        level: int,
        msg: str,
        *args: object,
        extra: Mapping[str, object],
        raised: Raised | None = None,
    ) -> None:
        """Log a record with additional attributes and, optionally, an exception."""
        if not self.isEnabledFor(level):
            return
        try:
            # Skip the frame of this method, so that the record shows its caller.
            path, line, function, _ = self.logger.findCaller(stacklevel=2)
            exc_info = raised and (type(raised.error), raised.error, raised.frames)
            record = self.logger.makeRecord(
                self.logger.name, level, path, line, msg, args, exc_info, function, extra
            )
            if raised is not None:
                # Formatters print this text instead of formatting the traceback.
                record.exc_text = raised.text
            self.logger.handle(record)
        except Exception:
            _print_exception(self.logger.name)

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message and its ``extra`` unchanged."""
        return msg, kwargs


def _print_exception(name: str) -> None:
    if not logging.raiseExceptions or sys.stderr is None:
        return
    # stderr may be closed as well.
    with contextlib.suppress(Exception):
        sys.stderr.write(f"--- Logging error: a filter or handler of {name!r} raised ---\n")
        traceback.print_exc(file=sys.stderr)


logger = SafeLogger(logging.getLogger("flask_bgjobs"), stays_enabled=True)
"""The logger of flask-bgjobs."""
