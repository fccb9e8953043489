"""Logging that never raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_bgjobs.system.safe_logging import SafeLogger


class Broken:
    """A filter, handler or record factory of a host that needs a request."""

    def filter(self, _record: logging.LogRecord) -> bool:
        raise RuntimeError("Working outside of request context.")


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("Working outside of request context.")


@pytest.fixture
def plain() -> Iterator[logging.Logger]:
    """A logger of the test's own."""
    logger = logging.getLogger("tests.safe_logging")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.filters.clear()
    logger.handlers.clear()


def break_filter(logger: logging.Logger, _monkeypatch: pytest.MonkeyPatch) -> None:
    logger.addFilter(Broken())


def break_handler(logger: logging.Logger, _monkeypatch: pytest.MonkeyPatch) -> None:
    logger.addHandler(BrokenHandler())


def break_factory(_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_logRecordFactory", Broken().filter)


@pytest.mark.parametrize("break_logging", [break_filter, break_handler, break_factory])
@pytest.mark.parametrize("method", ["debug", "info", "warning", "error", "exception"])
def test_nothing_is_raised(
    plain: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    break_logging: Callable[[Any, Any], None],
    method: str,
) -> None:
    """A filter, handler or record factory that raises reaches stderr, and not the caller."""
    break_logging(plain, monkeypatch)
    getattr(SafeLogger(plain), method)("job %s", 7)
    assert "--- Logging error" in capsys.readouterr().err


def test_stderr_stays_clean_in_production(
    plain: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``logging.raiseExceptions = False`` keeps the exception off stderr, as for any handler."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    plain.addFilter(Broken())
    SafeLogger(plain).error("job")
    assert capsys.readouterr().err == ""


def test_a_record_is_that_of_the_caller(
    plain: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """A record has the function and the line that logged it, its arguments and its ``extra``."""
    safe = SafeLogger(plain)
    safe.warning("job %s", 7, extra={"bgjobs_job": 7})
    (record,) = caplog.records
    assert (record.funcName, record.filename) == (
        "test_a_record_is_that_of_the_caller",
        "test_safe_logging.py",
    )
    assert record.getMessage() == "job 7"
    assert vars(record)["bgjobs_job"] == 7


def test_levels_are_those_of_the_logger(
    plain: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """What the wrapped logger leaves out is left out."""
    plain.setLevel(logging.ERROR)
    safe = SafeLogger(plain)
    safe.info("job")
    assert not safe.isEnabledFor(logging.INFO)
    assert caplog.records == []
