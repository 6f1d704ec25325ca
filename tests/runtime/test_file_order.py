"""Copies of a file store run beside compute, and those of one slot in the order in which they were started.

The system calls are held up by gates, so that nothing depends on how fast the disk is.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_compile.runtime.file_store import FileStore

CPU = torch.device("cpu")
OLD, NEW = torch.zeros(5000), torch.ones(5000)
_MOMENT = 0.3  # what a call gets to come where it must not come; it is not waited for elsewhere


class Gate:
    """Holds up the first calls of a function; `came` says that one is here."""

    def __init__(self, function: Callable[..., Any], held: int) -> None:
        self.came, self.opened = threading.Event(), threading.Event()
        self._function = function
        self._held = held
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            self._held -= 1
            held = self._held >= 0
        self.came.set()
        if held:
            assert self.opened.wait(60), "the gate was never opened"
        return self._function(*args)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def _hold(patch: pytest.MonkeyPatch, name: str, held: int = 1) -> Gate:
    gate = Gate(getattr(os, name), held)
    patch.setattr(os, name, gate)
    return gate


def test_compute_goes_on_while_a_copy_reads(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", NEW).wait()
    gate = _hold(monkeypatch, "preadv")
    copy = store.get(stand_in, CPU)
    assert gate.came.wait(60)
    product = torch.ones(64, 64) @ torch.ones(64, 64)  # the read is under way and stays so until this is done
    assert not copy._job.done.is_set()
    gate.opened.set()
    assert torch.equal(copy.wait(), NEW)
    assert product[0, 0].item() == 64


def test_compute_goes_on_while_a_copy_writes(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _hold(monkeypatch, "pwritev")
    copy = store.put("a", NEW)
    assert gate.came.wait(60)
    product = torch.ones(64, 64) @ torch.ones(64, 64)
    assert not copy._job.done.is_set()
    gate.opened.set()
    assert torch.equal(copy.wait(), NEW)
    assert product[0, 0].item() == 64


def test_reads_go_on_while_a_copy_of_another_slot_writes(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", OLD).wait()
    gate = _hold(monkeypatch, "pwritev")
    writing = store.put("b", NEW)
    assert gate.came.wait(60)
    assert torch.equal(store.get(stand_in, CPU).wait(), OLD)
    gate.opened.set()
    writing.wait()


def test_a_get_sees_what_was_put_before(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", OLD).wait()
    writes, reads = _hold(monkeypatch, "pwritev"), _hold(monkeypatch, "preadv", held=0)
    store.put("a", NEW)
    copy = store.get(stand_in, CPU)
    assert not reads.came.wait(_MOMENT)
    writes.opened.set()
    assert torch.equal(copy.wait(), NEW)


@pytest.mark.parametrize("second", ["put", "put_into"])
def test_a_put_does_not_overtake_a_get(store: FileStore, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    stand_in = store.put("a", OLD).wait()
    writes, reads = _hold(monkeypatch, "pwritev", held=0), _hold(monkeypatch, "preadv")
    copy = store.get(stand_in, CPU)
    writing = store.put("a", NEW) if second == "put" else store.put_into(stand_in, NEW)
    assert not writes.came.wait(_MOMENT)
    reads.opened.set()
    assert torch.equal(copy.wait(), OLD)
    writing.wait()
    assert torch.equal(stand_in, NEW)


@pytest.mark.parametrize("second", ["put", "put_into"])
def test_puts_of_a_slot_happen_in_order(store: FileStore, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    stand_in = store.put("a", OLD).wait()
    gate = _hold(monkeypatch, "pwritev")
    first = store.put("a", torch.full((5000,), 2.0))
    assert gate.came.wait(60)
    gate.came.clear()
    last = store.put("a", NEW) if second == "put" else store.put_into(stand_in, NEW)
    assert not gate.came.wait(_MOMENT)
    gate.opened.set()
    last.wait()
    first.wait()
    assert torch.equal(stand_in, NEW)


def test_a_put_of_nothing_hides_no_earlier_one(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", OLD).wait()
    writes, reads = _hold(monkeypatch, "pwritev"), _hold(monkeypatch, "preadv", held=0)
    store.put("a", NEW)
    store.put_into(stand_in[:0], NEW[:0]).wait()
    copy = store.get(stand_in, CPU)
    assert not reads.came.wait(_MOMENT)
    writes.opened.set()
    assert torch.equal(copy.wait(), NEW)


def test_a_dropped_place_waits_for_its_copies(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", OLD).wait()
    gate = _hold(monkeypatch, "preadv")
    copy = store.get(stand_in, CPU)
    dropper = threading.Thread(target=store.drop, args=("a",))
    dropper.start()
    dropper.join(_MOMENT)
    assert dropper.is_alive()
    gate.opened.set()
    dropper.join(60)
    assert not dropper.is_alive()
    assert torch.equal(copy.wait(), OLD)


def test_synchronize_waits_for_what_was_started(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _hold(monkeypatch, "pwritev")
    stand_in = store.put("a", NEW).tensor
    threading.Timer(_MOMENT, gate.opened.set).start()
    store.synchronize()
    assert torch.equal(stand_in, NEW)


def test_it_knows_how_long_it_was_waited_for(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _hold(monkeypatch, "pwritev")
    copy = store.put("a", NEW)
    assert gate.came.wait(60)
    assert store.traffic.waiting_us == 0
    threading.Timer(_MOMENT, gate.opened.set).start()
    copy.wait()
    traffic = store.traffic
    assert traffic.waiting_us > 0.5e6 * _MOMENT
    assert traffic.writing_us > 0.5e6 * _MOMENT
