"""The measurements, one module each."""

from __future__ import annotations

from ..measure import Measure
from . import backlog, dashboard, enqueue, idle, latency, limits, memory, throughput

_MODULES = (enqueue, throughput, latency, idle, backlog, limits, memory, dashboard)
ALL: dict[str, Measure] = {module.MEASURE.name: module.MEASURE for module in _MODULES}
