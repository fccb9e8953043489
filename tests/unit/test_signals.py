"""Signals, and receivers that raise."""

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
def test_failing_receiver_is_logged(
    signal: NamedSignal, shop: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """A receiver that raises is logged, and the other receivers are still called."""
    received: list[Any] = []

    def first(app: Flask, **values: Any) -> None:
        received.append((app, values))

    def failing(app: Flask, **values: Any) -> None:
        raise RuntimeError("receiver")

    def last(app: Flask, **values: Any) -> None:
        received.append((app, values))

    before = dict(signal.receivers)
    signal.receivers.clear()  # the receivers that log need real values
    try:
        for receiver in (first, failing, last):
            signal.connect(receiver)
        emit(signal, shop, job=5)
    finally:
        for receiver in (first, failing, last):
            signal.disconnect(receiver)
        signal.receivers.update(before)
    assert received == [(shop, {"job": 5})] * 2
    assert f"A receiver of {signal.name} raised" in caplog.text
    assert "RuntimeError: receiver" in caplog.text


def test_receiver_of_one_app(shop: Flask) -> None:
    """A receiver connected for one app is not called for another app's signals."""
    received: list[Any] = []

    def receive(app: Flask, **values: Any) -> None:
        received.append(app)

    signal = signals.worker_started
    with signal.connected_to(receive, sender=shop):
        emit(signal, Flask("other"), worker="w")
        emit(signal, shop, worker="w")
    assert received == [shop]


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
def test_signal_for_recorded_status(
    status: JobStatus | None, signal: NamedSignal | None, state: Any, host: Flask
) -> None:
    """Each recorded status sends its own signal. A job given back or a lost lease sends none."""
    received: list[Any] = []

    def make_receiver(name: str) -> Any:
        def receive(app: Flask, **values: Any) -> None:
            received.append((name, values))

        return receive

    settled = Settled(make_spec(), Outcome(42, 1, OutcomeKind.FAILED, error="E"), status)
    receivers = {each_signal: make_receiver(each_signal.name) for each_signal in ALL}
    for each_signal, receive in receivers.items():
        each_signal.connect(receive, sender=host)
    try:
        emit_settled(host, settled)
    finally:
        for each_signal, receive in receivers.items():
            each_signal.disconnect(receive, sender=host)
    values = {"job": settled.spec, "settled": settled}
    assert received == ([] if signal is None else [(signal.name, values)])


def test_exiting_receiver_does_not_stop_worker(
    shop: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """``sys.exit()`` in a receiver does not stop a worker.

    A web server passes the exit on, because its own signal handler may have raised it.
    """
    signal = NamedSignal("exits")

    def exit_process(app: Flask) -> None:
        raise SystemExit(0)

    with signal.connected_to(exit_process):
        emit_in_worker(signal, shop)
        assert "A receiver of exits raised" in caplog.text
        with pytest.raises(SystemExit):
            emit(signal, shop)


def test_nested_signal_restores_current_emission(shop: Flask) -> None:
    """After a receiver has sent another signal, ``emission_in`` names the outer signal again."""
    outer, inner = NamedSignal("outer"), NamedSignal("inner")
    thread_id = threading.get_ident()
    emissions: list[Any] = []

    def record_emission(app: Flask) -> None:
        emissions.append(signals.emission_in(thread_id))

    def send_inner(app: Flask) -> None:
        emit(inner, app)
        record_emission(app)

    with outer.connected_to(send_inner), inner.connected_to(record_emission):
        emit(outer, shop)
    assert [emission.signal_name for emission in emissions] == ["inner", "outer"]
    assert signals.emission_in(thread_id) is None
