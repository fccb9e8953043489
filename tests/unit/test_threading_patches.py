"""Detection of patched threads, and locks created before a patch."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest

from flask_bgjobs.system import threading_patches
from flask_bgjobs.system.threading_patches import Lock

_ThreadingLock = threading.Lock


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No library that patches threads has been imported."""
    for name in ("gevent.monkey", "eventlet.patcher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return monkeypatch


def test_unpatched_process(unpatched: pytest.MonkeyPatch) -> None:
    """An ordinary process is not patched."""
    assert threading_patches.patched_by() is None


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize(
    ("module", "function", "patched_module"),
    [
        ("gevent.monkey", "is_module_patched", "threading"),
        ("eventlet.patcher", "is_monkey_patched", "thread"),
    ],
)
def test_patching_library_is_named(
    unpatched: pytest.MonkeyPatch, module: str, function: str, patched_module: str, is_patched: bool
) -> None:
    """A library is named if it has patched threads, but not if it is only imported."""
    fake = types.ModuleType(module)
    setattr(fake, function, lambda name: is_patched and name == patched_module)
    unpatched.setitem(sys.modules, module, fake)
    library = module.partition(".")[0]
    assert threading_patches.patched_by() == (library if is_patched else None)
    assert library in threading_patches.refusal(library)


def record_locks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace ``threading.Lock``, as a patch does, and record the locks that it creates."""
    locks: list[Any] = []

    def create_lock() -> Any:
        locks.append(_ThreadingLock())
        return locks[-1]

    monkeypatch.setattr(threading, "Lock", create_lock)
    return locks


def test_lock_is_replaced_after_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a patch, a lock uses the patched class, even if the old lock is held."""
    lock = Lock()
    lock.__enter__()
    locks = record_locks(monkeypatch)
    for _ in range(2):
        with lock:
            assert locks[0].locked()
        assert not locks[0].locked()
    assert len(locks) == 1


def test_lock_is_held_inside_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held inside the ``with`` block and released after it."""
    locks = record_locks(monkeypatch)
    lock = Lock()
    (inner,) = locks
    with lock:
        assert inner.locked()
    assert not inner.locked()
