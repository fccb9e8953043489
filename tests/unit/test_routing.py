"""Which pool runs the jobs of which queue."""

from __future__ import annotations

from typing import Any

import pytest

from flask_bgjobs.config import POOLS
from flask_bgjobs.execution.pools.kinds import KINDS
from flask_bgjobs.worker.routing import Route, routes

IMAGES = {"images": "process"}


def make_routes(default: str, pools: dict[str, str], queues: list[str] | None) -> list[Route]:
    return routes(default, pools, queues, {"thread": 10, "process": 2}.__getitem__)


@pytest.mark.parametrize(
    ("default", "pools", "queues", "expected"),
    [
        ("thread", {}, None, [Route("thread", 10, None)]),
        ("process", {}, ["a", "b"], [Route("process", 2, ("a", "b"))]),
        (
            "thread",
            IMAGES,
            None,
            [Route("thread", 10, None, frozenset({"images"})), Route("process", 2, ("images",))],
        ),
        (
            "thread",
            IMAGES,
            ["mail", "images", "low"],
            [
                Route("thread", 10, ("mail", "low"), frozenset({"images"})),
                Route("process", 2, ("images",)),
            ],
        ),
        ("thread", IMAGES, ["images"], [Route("process", 2, ("images",))]),
        ("thread", IMAGES, ["mail"], [Route("thread", 10, ("mail",))]),
        ("process", IMAGES, None, [Route("process", 2, None)]),
        (
            "process",
            {"mail": "thread"},
            None,
            [Route("process", 2, None, frozenset({"mail"})), Route("thread", 10, ("mail",))],
        ),
    ],
)
def test_routes(default: str, pools: Any, queues: Any, expected: list[Route]) -> None:
    """Each queue goes to its own pool or the default pool, in the given order.

    A pool without queues is not created.
    """
    assert make_routes(default, pools, queues) == expected


def test_queue_has_exactly_one_route() -> None:
    """Each queue is served by exactly one pool."""
    two_routes = make_routes("thread", IMAGES, None)
    for queue in ("default", "mail", "images"):
        assert [route.serves(queue) for route in two_routes].count(True) == 1


def test_configurable_pools_match_pool_kinds() -> None:
    """The pools that can be configured are exactly the existing kinds."""
    assert tuple(KINDS) == POOLS
