"""Threads that are patched, and locks from before that."""

from __future__ import annotations

import sys
import threading
import types

import pytest

from flask_bgjobs.system import threading_patches
from flask_bgjobs.system.threading_patches import Lock

_REAL = threading.Lock


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No library that patches threads is imported."""
    for name in ("gevent.monkey", "eventlet.patcher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return monkeypatch


def test_nobody_has_patched(unpatched: pytest.MonkeyPatch) -> None:
    """An ordinary process is not patched."""
    assert threading_patches.patched_by() is None


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize(
    ("module", "asks", "of"),
    [
        ("gevent.monkey", "is_module_patched", "threading"),
        ("eventlet.patcher", "is_monkey_patched", "thread"),
    ],
)
def test_who_has_patched(
    unpatched: pytest.MonkeyPatch, module: str, asks: str, of: str, is_patched: bool
) -> None:
    """A library counts that has patched threads, and not one that is only imported."""
    fake = types.ModuleType(module)
    setattr(fake, asks, lambda what: is_patched and what == of)
    unpatched.setitem(sys.modules, module, fake)
    library = module.partition(".")[0]
    assert threading_patches.patched_by() == (library if is_patched else None)
    assert library in threading_patches.refusal(library)


def test_a_lock_from_before_a_patch_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a patch a lock is one of the new kind, whatever holds the old one."""
    made: list[object] = []

    def make() -> object:
        made.append(_REAL())
        return made[-1]

    lock = Lock()
    old = lock._lock
    old.acquire()
    monkeypatch.setattr(threading, "Lock", make)
    for _ in range(2):
        with lock:
            assert lock._lock is made[0]
    assert len(made) == 1


def test_a_lock_excludes() -> None:
    """It is held by one thread at a time."""
    lock = Lock()
    with lock:
        assert lock._lock.locked()
    assert not lock._lock.locked()
