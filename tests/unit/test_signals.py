"""Signals, and receivers that fail."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from blinker import NamedSignal
from flask import Flask

from flask_bgjobs import signals
from flask_bgjobs.job.records import Outcome, Settled
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.signals import emit, emit_in_worker, emit_settled
from tests.unit.helpers import make_spec

ALL = [signal for signal in vars(signals).values() if isinstance(signal, NamedSignal)]


@pytest.fixture
def shop() -> Flask:
    return Flask("shop")


@pytest.mark.parametrize("signal", ALL, ids=lambda signal: signal.name)
def test_receiver_that_raises(
    signal: NamedSignal, shop: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """A receiver that raises is logged, and keeps no other from hearing."""
    heard: list[Any] = []

    def first(app: Flask, **values: Any) -> None:
        heard.append((app, values))

    def broken(app: Flask, **values: Any) -> None:
        raise RuntimeError("receiver")

    def last(app: Flask, **values: Any) -> None:
        heard.append((app, values))

    before = dict(signal.receivers)
    signal.receivers.clear()  # those of the log lines want real values
    try:
        for receiver in (first, broken, last):
            signal.connect(receiver)
        emit(signal, shop, job=5)
    finally:
        for receiver in (first, broken, last):
            signal.disconnect(receiver)
        signal.receivers.update(before)
    assert heard == [(shop, {"job": 5})] * 2
    assert f"A receiver of {signal.name} raised" in caplog.text
    assert "RuntimeError: receiver" in caplog.text


def test_only_of_this_app(shop: Flask) -> None:
    """A receiver connected for one app does not hear another's jobs."""
    heard: list[Any] = []

    def hear(app: Flask, **values: Any) -> None:
        heard.append(app)

    signal = signals.worker_started
    with signal.connected_to(hear, sender=shop):
        emit(signal, Flask("other"), worker="w")
        emit(signal, shop, worker="w")
    assert heard == [shop]


@pytest.mark.parametrize(
    ("status", "signal"),
    [
        (JobStatus.COMPLETED, signals.job_completed),
        (JobStatus.RETRYING, signals.job_retrying),
        (JobStatus.FAILED, signals.job_failed),
        (JobStatus.CANCELLED, signals.job_cancelled),
        (JobStatus.PENDING, None),
        (JobStatus.SCHEDULED, None),
        (None, None),
    ],
)
def test_signal_of_a_status(
    status: JobStatus | None, signal: NamedSignal | None, state: Any, host: Flask
) -> None:
    """What was recorded has the signal of its status; a give-back and a lost lease have none."""
    heard: list[Any] = []

    def hearer(name: str) -> Any:
        def hear(app: Flask, **values: Any) -> None:
            heard.append((name, values))

        return hear

    settled = Settled(make_spec(), Outcome(42, 1, OutcomeKind.FAILED, error="E"), status)
    hearers = {one: hearer(one.name) for one in ALL}
    for one, hear in hearers.items():
        one.connect(hear, sender=host)
    try:
        emit_settled(host, settled)
    finally:
        for one, hear in hearers.items():
            one.disconnect(hear, sender=host)
    values = {"job": settled.spec, "settled": settled}
    assert heard == ([] if signal is None else [(signal.name, values)])


def test_a_receiver_that_exits_ends_no_worker(
    shop: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """``sys.exit()`` in a receiver would end the worker as if it had been told to stop. In a web
    server the exit goes on, as its own signal handler may have raised it."""
    signal = NamedSignal("exits")

    def leave(app: Flask) -> None:
        raise SystemExit(0)

    with signal.connected_to(leave):
        emit_in_worker(signal, shop)
        assert "A receiver of exits raised" in caplog.text
        with pytest.raises(SystemExit):
            emit(signal, shop)


def test_a_signal_within_a_receiver_hides_no_slow_one(shop: Flask) -> None:
    """After a receiver has sent a signal itself, it is still known what it is called for."""
    outer, inner = NamedSignal("outer"), NamedSignal("inner")
    thread_id = threading.get_ident()
    seen: list[Any] = []

    def note(app: Flask) -> None:
        seen.append(signals.emission_in(thread_id))

    def send(app: Flask) -> None:
        emit(inner, app)
        note(app)

    with outer.connected_to(send), inner.connected_to(note):
        emit(outer, shop)
    assert [emission.signal_name for emission in seen] == ["inner", "outer"]
    assert signals.emission_in(thread_id) is None
