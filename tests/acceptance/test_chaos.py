"""Chaos, short: the same as ``make chaos``, for as long as a test may take."""

from __future__ import annotations

import os
import random

import pytest

from tests.chaos.run import run

pytestmark = pytest.mark.acceptance

_SECONDS = 20
_SEEDS = 1_000_000


@pytest.fixture
def seed() -> int:
    """Of jobs and faults: a new one for each test, or that of ``BGJOBS_CHAOS_SEED``."""
    return int(os.environ.get("BGJOBS_CHAOS_SEED") or random.randrange(_SEEDS))


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mysql"])
def test_chaos(database: str, seed: int, record_property: pytest.FixtureRequest) -> None:
    """While workers, children and the database break, no job is lost, settled twice, stuck or
    wrongly quarantined, and each ends as it must."""
    record_property("BGJOBS_CHAOS_SEED", seed)
    print(f"BGJOBS_CHAOS_SEED={seed}")
    report = run(database, seconds=_SECONDS, seed=seed, say=print)
    assert report.is_good, f"BGJOBS_CHAOS_SEED={seed}\n{report}"
    print(report)
