"""Which queues go into which pool."""

from __future__ import annotations

from typing import Any

import pytest

from flask_bgjobs.config import POOLS
from flask_bgjobs.execution.pools.kinds import KINDS
from flask_bgjobs.worker.routing import Route, routes

IMAGES = {"images": "process"}


def made(default: str, pools: dict[str, str], queues: list[str] | None) -> list[Route]:
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
    """Each queue goes into its own pool or the default one, in the order given; a pool without
    queues is not made."""
    assert made(default, pools, queues) == expected


def test_every_queue_has_exactly_one_route() -> None:
    """No queue is served twice, and none is left out."""
    both = made("thread", IMAGES, None)
    for queue in ("default", "mail", "images"):
        assert [route.serves(queue) for route in both].count(True) == 1


def test_every_pool_that_can_be_configured_is_known() -> None:
    """And no other."""
    assert tuple(KINDS) == POOLS
