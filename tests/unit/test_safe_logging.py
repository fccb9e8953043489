"""Logging that never raises an exception."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from flask_bgjobs.system.safe_logging import SafeLogger


class FailingFilter:
    """A filter or record factory of the host app that fails outside a request."""

    def filter(self, _record: logging.LogRecord) -> bool:
        raise RuntimeError("Working outside of request context.")


class FailingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("Working outside of request context.")


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger that only this test uses."""
    logger = logging.getLogger("tests.safe_logging")
    logger.setLevel(logging.DEBUG)
    record_factory = logging.getLogRecordFactory()
    yield logger
    logging.setLogRecordFactory(record_factory)
    logger.filters.clear()
    logger.handlers.clear()


def add_failing_filter(logger: logging.Logger) -> None:
    logger.addFilter(FailingFilter())


def add_failing_handler(logger: logging.Logger) -> None:
    logger.addHandler(FailingHandler())


def set_failing_record_factory(_logger: logging.Logger) -> None:
    logging.setLogRecordFactory(FailingFilter().filter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make_logging_fail", [add_failing_filter, add_failing_handler, set_failing_record_factory]
)
@pytest.mark.parametrize("method", ["debug", "info", "warning", "error", "exception"])
def test_failing_logging_raises_nothing(
    logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    make_logging_fail: Callable[[logging.Logger], None],
    method: str,
) -> None:
    """An exception in a filter, handler or record factory is printed to stderr, not raised."""
    make_logging_fail(logger)
    getattr(SafeLogger(logger), method)("job %s", 7)
    assert "--- Logging error" in capsys.readouterr().err


def test_raise_exceptions_disabled(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``logging.raiseExceptions = False``, nothing is printed to stderr."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger.addFilter(FailingFilter())
    SafeLogger(logger).error("job")
    assert capsys.readouterr().err == ""


def test_record_has_position_of_caller(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """A record has the caller's function and file, its arguments and its ``extra``."""
    safe = SafeLogger(logger)
    safe.warning("job %s", 7, extra={"bgjobs_job": 7})
    (record,) = caplog.records
    assert (record.funcName, record.filename) == (
        "test_record_has_position_of_caller",
        "test_safe_logging.py",
    )
    assert record.getMessage() == "job 7"
    assert vars(record)["bgjobs_job"] == 7


def test_level_of_wrapped_logger(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    """Records below the wrapped logger's level are not logged."""
    logger.setLevel(logging.ERROR)
    safe = SafeLogger(logger)
    safe.info("job")
    assert not safe.isEnabledFor(logging.INFO)
    assert caplog.records == []
