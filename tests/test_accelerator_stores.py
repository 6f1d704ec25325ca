"""The stores beside an accelerator, on a simulated one with a slow link: every wait that is missing shows in the numbers.

`python -m tests.test_accelerator_stores` does the work in a process of its own and prints what it saw as JSON; the tests read it.
What a check queues first keeps a stream busy for longer than the copy that must wait for it takes.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.host_store import HostStore
from chunkft_compile.runtime.store import Store
from chunkft_compile.runtime.stores import Stores, measure_link
from chunkft_compile.runtime.transfers import PIECE_NBYTES
from tests.support.simdev import SimDevice, register, run_beside

pytestmark = pytest.mark.slow

_SIZE = 4096
_COPY_SECONDS = 0.1
_SLOW = 4 * _SIZE / _COPY_SECONDS  # bytes per second


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What happened in the other process."""
    return run_beside("tests.test_accelerator_stores")


CHECKS: dict[str, Callable[[Store], str]] = {}


def _check(function: Callable[[Store], str]) -> Callable[[Store], str]:
    CHECKS[function.__name__.removeprefix("_").replace("_", " ")] = function
    return function


def _values(value: float, size: int = _SIZE) -> torch.Tensor:
    return torch.full((size,), float(value), device="sim")


def _judge(tensor: torch.Tensor, value: float) -> str:
    """`tensor` holds nothing but `value`."""
    seen = tensor.clone().cpu()
    if bool((seen == value).all()):
        return "right"
    return "nan" if bool(seen.isnan().any()) else "wrong"


def _keep_busy() -> torch.Tensor:
    """Queue a copy on the current stream that takes four times as long as one of `_SIZE`."""
    return torch.zeros(4 * _SIZE).pin_memory().to("sim", non_blocking=True)


@_check
def _put_waits_for_what_makes_its_source(store: Store) -> str:
    kept = [_keep_busy()]
    source = torch.ones(_SIZE).pin_memory().to("sim", non_blocking=True)
    stand_in = store.put("a", source).tensor
    store.synchronize()
    return _judge(stand_in, 1) if kept else ""


@_check
def _get_waits_for_the_block_it_is_given(store: Store) -> str:
    """The allocator fills it when the stream comes to it."""
    stand_in = store.put("a", _values(1)).wait()
    store.synchronize()
    kept = [_keep_busy()]
    copy = store.get(stand_in, torch.device("sim"))
    return _judge(copy.wait(), 1) if kept else ""


@_check
def _get_waits_for_an_earlier_put(store: Store) -> str:
    stand_in = store.put("a", _values(0)).wait()
    store.put("busy", _values(2, 4 * _SIZE))
    store.put("a", _values(1))
    return _judge(store.get(stand_in, torch.device("sim")).wait(), 1)


@_check
def _put_waits_for_an_earlier_get(store: Store) -> str:
    busy = store.put("busy", _values(2, 4 * _SIZE)).wait()
    stand_in = store.put("a", _values(1)).wait()
    store.synchronize()
    new = _values(0)
    delay = store.get(busy, torch.device("sim"))
    copy = store.get(stand_in, torch.device("sim"))
    store.put("a", new)
    seen = _judge(copy.wait(), 1)
    delay.wait()
    store.synchronize()
    return seen if _judge(stand_in, 0) == "right" else "the put was lost"


@_check
def _a_target_is_read_after_its_copy(store: Store) -> str:
    stand_in = store.put("a", _values(1)).wait()
    return _judge(store.get(stand_in, torch.device("sim")).wait(), 1)


@_check
def _a_source_is_freed_after_its_copy(store: Store) -> str:
    source = _values(1)
    stand_in = store.put("a", source).wait()
    del source
    torch.accelerator.current_stream().synchronize()
    store.synchronize()
    return _judge(stand_in, 1)


@_check
def _a_source_that_nobody_waits_for_is_kept(store: Store) -> str:
    stand_in = store.put("a", _values(1)).tensor
    torch.accelerator.current_stream().synchronize()
    store.synchronize()
    return _judge(stand_in, 1)


@_check
def _a_target_that_nobody_waits_for_is_kept(store: Store) -> str:
    stand_in = store.put("a", _values(1)).wait()
    store.synchronize()
    store.get(stand_in, torch.device("sim"))
    other = _values(3)  # in the same block, if that was free already
    store.synchronize()
    return _judge(other, 3)


@_check
def _stand_ins_are_complete_for_the_host(store: Store) -> str:
    stand_in = store.put("a", _values(1)).tensor
    store.synchronize()
    return _judge(stand_in, 1)


@_check
def _stand_ins_may_be_changed_by_the_host(store: Store) -> str:
    stand_in = store.put("a", _values(1)).wait()
    store.synchronize()
    copy = store.get(stand_in, torch.device("sim"))
    store.synchronize()
    stand_in.fill_(0.0)
    return _judge(copy.wait(), 1)


@_check
def _parts_are_copied(store: Store) -> str:
    stand_in = store.put("a", _values(1)).tensor
    store.put_into(stand_in[100:200], _values(0, 100))
    target = _values(7)
    store.get_into(stand_in[50:250], target[:200]).wait()
    expected = torch.cat([torch.ones(50), torch.zeros(100), torch.ones(50), torch.full((_SIZE - 200,), 7.0)])
    store.synchronize()
    stored = torch.equal(stand_in[:300], torch.cat([torch.ones(100), torch.zeros(100), torch.ones(100)]))
    return "right" if stored and torch.equal(target.cpu(), expected) else "wrong"


@_check
def _copies_do_not_stop_the_host(store: Store) -> str:
    """The copies take half a second; the device computes on its stream before the first is done."""
    source = _values(1)
    copies = [store.put(number, source) for number in range(5)]
    done = torch.accelerator.current_stream().record_event()
    done.synchronize()
    waited = [copy for copy in copies if _is_done(copy)]
    store.synchronize()
    return "right" if not waited else f"{len(waited)} done"


def _is_done(copy: Any) -> bool:
    return bool(copy.done.query() if hasattr(copy, "done") else copy._job.done.is_set())


@_check
def _bytes_are_counted(store: Store) -> str:
    before = store.traffic
    stand_in = store.put("a", _values(1)).wait()
    store.get(stand_in, torch.device("sim")).wait()
    torch.accelerator.current_stream().synchronize()
    store.synchronize()
    moved = store.traffic - before
    counted = moved.written_nbytes == moved.read_nbytes == 4 * _SIZE
    timed = min(moved.writing_us, moved.reading_us, moved.waiting_us) > 0.9e6 * _COPY_SECONDS
    return "right" if counted and timed else repr(moved)


@_check
def _nothing_is_left_behind(store: Store) -> str:
    before = torch.accelerator.memory_allocated()
    copy: Any = store.put("a", _values(1))
    stand_in = copy.wait()
    after_put = torch.accelerator.memory_allocated()
    copy = store.get(stand_in, torch.device("sim"))
    copy.wait()
    del copy
    return "right" if torch.accelerator.memory_allocated() == after_put == before else "left"


def _large(store: Store) -> str:
    """Several pieces through each staging buffer, and a size that ends inside a page."""
    tensor = torch.randn(5 * PIECE_NBYTES // 2 + 77)
    stand_in = store.put("a", tensor.to("sim")).wait()
    copy = store.get(stand_in, torch.device("sim")).wait()
    store.synchronize()
    return "right" if torch.equal(copy.cpu(), tensor) and torch.equal(stand_in, tensor) else "wrong"


def _drop() -> str:
    """Of a store that is dropped, memory goes back at once, not at the next garbage collection: the budget counts it."""
    gc.disable()
    try:
        before = torch.accelerator.memory_allocated()
        store = HostStore(torch.device("sim"))
        store.get(store.put("a", _values(1)).wait(), torch.device("sim"))
        del store
        others = [_values(3) for _ in range(2)]  # one of them in the block of the get, which is still under way
        torch.accelerator.synchronize()
        seen = ({_judge(other, 3) for other in others} - {"right"} or {"right"}).pop()
        del others
        return seen if torch.accelerator.memory_allocated() == before else "left"
    finally:
        gc.enable()


# ---- what runs in the other process


def _main() -> None:
    device, found = register(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as directory:
        for name in ("host", "disk"):
            found[name] = _run(device, lambda name=name: _open(name, Path(directory)))  # type: ignore[misc]
        found["dropped"] = _run_one(device, _drop)
        stores = Stores(torch.device("sim"), Path(directory))
        found["stores"] = [type(stores[place]).__name__ for place in stores.placements]
        found["links"] = {p: measure_link(torch.device("sim"), Path(directory), p).overlaps for p in (Placement.HOST, Placement.DISK)}
    print(json.dumps(found))


def _open(name: str, directory: Path) -> Store:
    return HostStore(torch.device("sim")) if name == "host" else FileStore(directory, torch.device("sim"))


def _run(device: SimDevice, make: Callable[[], Store]) -> dict[str, str]:
    seen = {"large": _large(make())}
    for check in CHECKS.values():  # what torch loads at the first call of an operator takes longer than a copy
        check(make())
    for name, check in CHECKS.items():
        seen[name] = _run_one(device, lambda check=check: check(make()))  # type: ignore[misc]
    return seen


def _run_one(device: SimDevice, check: Callable[[], str]) -> str:
    device.configure(link_bytes_per_s=_SLOW)
    seen = check()
    torch.accelerator.synchronize()
    device.configure()
    return seen


@pytest.mark.parametrize("name", ["large", *CHECKS])
@pytest.mark.parametrize("store", ["host", "disk"])
def test_every_wait_is_there(report: dict[str, Any], store: str, name: str) -> None:
    assert report[store][name] == "right"


def test_a_dropped_store_gives_its_memory_back_after_its_copies(report: dict[str, Any]) -> None:
    assert report["dropped"] == "right"


def test_an_accelerator_has_both_stores(report: dict[str, Any]) -> None:
    assert report["stores"] == ["HostStore", "FileStore"]
    assert report["links"] == {"host": True, "disk": True}


if __name__ == "__main__":
    _main()
