"""A short run of the chaos suite, like ``make chaos``."""

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
    """The seed of jobs and faults: ``BGJOBS_CHAOS_SEED``, or a random one for each test."""
    return int(os.environ.get("BGJOBS_CHAOS_SEED") or random.randrange(_SEEDS))


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mysql"])
def test_chaos(database: str, seed: int, record_property: pytest.FixtureRequest) -> None:
    """While workers, children and the database fail, no job is lost, settled twice, stuck or
    wrongly quarantined, and each has its expected outcome."""
    record_property("BGJOBS_CHAOS_SEED", seed)
    print(f"BGJOBS_CHAOS_SEED={seed}")
    report = run(database, seconds=_SECONDS, seed=seed, say=print)
    assert report.is_good, f"BGJOBS_CHAOS_SEED={seed}\n{report}"
    print(report)
