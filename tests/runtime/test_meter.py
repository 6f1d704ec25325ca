"""The meter against the exact allocator hook, to the byte, with and without it; and what it refuses."""

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import profiler

from chunkft_compile.runtime import meter as meter_module
from chunkft_compile.runtime.meter import CallCost, PeakMeter, measure_calls
from chunkft_compile.runtime.native import BuildError
from tests.support.allocator import Allocator, allocator_or_skip

Call = Callable[[], object]
KIB = 1024


@pytest.fixture
def allocator() -> Allocator:
    return allocator_or_skip()


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""

    def refuse() -> Allocator:
        raise BuildError("no compiler")

    monkeypatch.setattr(meter_module, "install", refuse)


@pytest.fixture(params=["hook", "profiler"])
def either(request: pytest.FixtureRequest) -> None:
    """With the hook, and without."""
    request.getfixturevalue("allocator" if request.param == "hook" else "profiled")


def _hidden_temporaries() -> dict[str, Call]:
    """Ops that allocate more than their outputs, on inputs made here."""
    aten = torch.ops.aten
    half = torch.randn(256, 512, dtype=torch.bfloat16)
    logits, labels = torch.randn(128, 1000), torch.randint(0, 1000, (128,))
    q, k, v = (torch.randn(2, 4, 128, 64) for _ in range(3))
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    image, filters = torch.randn(2, 8, 32, 32), torch.randn(8, 8, 3, 3)
    indices = torch.randint(0, 1000, (256,))
    flags = torch.rand(256, 512) > 0.5

    def backward() -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(leaf, labels), leaf)[0]

    return {
        "bf16 mean": lambda: half.mean(-1),
        "bf16 mm": lambda: torch.mm(half, half.t()),
        "cross_entropy": lambda: F.cross_entropy(logits, labels),
        "cross_entropy with backward": backward,
        "flash": lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
        "flash backward": lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(q, q, k, v, out, logsumexp, 0.0, True),
        "convolution": lambda: F.conv2d(image, filters, padding=1),
        "native_dropout": lambda: torch.native_dropout(logits, 0.1, True),
        "rms_norm": lambda: F.rms_norm(logits, (1000,)),
        "embedding_dense_backward": lambda: aten.embedding_dense_backward(half, indices, 1000, -1, False),
        "nonzero": lambda: flags.nonzero(),
        "sort": lambda: logits.sort(),
        "in place": lambda: q.add_(0.0),
        "view": lambda: q.view(-1),
        "nothing": lambda: None,
    }


def _hooked(call: Call, allocator: Allocator) -> tuple[int, int]:
    """Peak and end of the second run of `call`, by the hook."""
    call()
    allocator.reset()
    before = allocator.live()
    result = call()
    peak, end = allocator.peak() - before, allocator.live() - before
    del result
    return peak, end


@pytest.mark.usefixtures("either")
def test_calls_agree_with_the_hook_to_the_byte(allocator: Allocator) -> None:
    calls = _hidden_temporaries()
    costs = measure_calls(list(calls.values()), "cpu")
    assert {name: (cost.peak_nbytes, cost.end_nbytes) for name, cost in zip(calls, costs, strict=True)} == {
        name: _hooked(call, allocator) for name, call in calls.items()
    }


@pytest.mark.usefixtures("either")
def test_known_sizes() -> None:
    half = torch.zeros(256, 512, dtype=torch.bfloat16)
    mean, view, twice = measure_calls([lambda: half.mean(-1), lambda: half.view(-1), lambda: (half + 1).float()], torch.device("cpu"))
    assert (mean.peak_nbytes, mean.end_nbytes) == (256 * 512 * 4 + 256 * 4 + 256 * 2, 256 * 2)  # a full fp32 copy, its mean, the result
    assert (view.peak_nbytes, view.end_nbytes) == (0, 0)
    assert (twice.peak_nbytes, twice.end_nbytes) == (256 * 512 * 6, 256 * 512 * 4)


def test_results_are_dropped_between_calls(allocator: Allocator) -> None:
    gc.collect()  # as the meter does, so that garbage of other tests is not counted as dropped here
    before = allocator.live()
    costs = measure_calls([lambda: torch.empty(KIB, dtype=torch.uint8)] * 3, "cpu")
    assert [(cost.peak_nbytes, cost.end_nbytes) for cost in costs] == [(KIB, KIB)] * 3
    assert allocator.live() == before


@pytest.mark.usefixtures("either")
def test_a_call_may_free_what_an_earlier_call_made() -> None:
    kept: list[torch.Tensor] = []
    grow, shrink = measure_calls([lambda: kept.append(torch.empty(KIB, dtype=torch.uint8)), kept.clear], "cpu")
    assert (grow.peak_nbytes, grow.end_nbytes) == (KIB, KIB)
    assert (shrink.peak_nbytes, shrink.end_nbytes) == (0, -KIB)


def test_seconds_are_those_of_the_call_alone() -> None:
    a = torch.randn(256, 256)
    small, large = measure_calls([lambda: a + 1, lambda: [a @ a for _ in range(20)]], "cpu")
    assert 0 < small.seconds < large.seconds


def test_no_calls() -> None:
    assert measure_calls([], "cpu") == []


@pytest.mark.usefixtures("either")
def test_meter_agrees_with_the_hook_over_training_steps(allocator: Allocator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(32, 64)
    for _ in range(2):  # the first step also makes the optimizer's state
        allocator.reset()
        before = allocator.live()
        with PeakMeter("cpu") as meter:
            loss = model(batch).sum()
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            del loss
        assert (meter.peak_nbytes, meter.end_nbytes) == (allocator.peak() - before, allocator.live() - before)


@pytest.mark.usefixtures("profiled")
def test_without_the_hook_frees_of_older_blocks_make_no_room() -> None:
    older = torch.empty(4 * KIB, dtype=torch.uint8)
    with PeakMeter("cpu") as meter:
        del older
        newer = torch.empty(KIB, dtype=torch.uint8)
    assert (meter.peak_nbytes, meter.end_nbytes, newer.nbytes) == (KIB, KIB, KIB)


@pytest.mark.usefixtures("profiled")
def test_an_address_an_earlier_session_saw_does_not_confuse() -> None:
    nbytes = 4 * KIB * KIB
    matches = 0
    for _ in range(20):  # the system allocator usually hands out the same address again, but need not
        with PeakMeter("cpu"):
            seen = torch.empty(nbytes, dtype=torch.uint8)
        address = seen.data_ptr()
        del seen
        reused = torch.empty(nbytes - 4 * KIB, dtype=torch.uint8)
        matches += reused.data_ptr() == address
        with PeakMeter("cpu") as meter:
            del reused
        assert meter.end_nbytes == 0
    if not matches:
        pytest.skip("the system allocator did not hand out the same address again")


def test_with_the_hook_frees_of_older_blocks_make_room(allocator: Allocator) -> None:
    older = torch.empty(4 * KIB, dtype=torch.uint8)
    with PeakMeter("cpu") as meter:
        del older
        newer = torch.empty(KIB, dtype=torch.uint8)
    assert (meter.peak_nbytes, meter.end_nbytes, newer.nbytes) == (0, -3 * KIB, KIB)


def _on_another_thread() -> tuple[int, int]:
    """Peak and end of a KiB that another thread makes and keeps."""
    kept: list[torch.Tensor] = []
    with PeakMeter("cpu") as meter:
        thread = threading.Thread(target=lambda: kept.append(torch.empty(KIB, dtype=torch.uint8)))
        thread.start()
        thread.join()
    return meter.peak_nbytes, meter.end_nbytes


def test_the_hook_sees_other_threads(allocator: Allocator) -> None:
    assert _on_another_thread() == (KIB, KIB)


@pytest.mark.usefixtures("profiled")
def test_the_profiler_does_not_see_other_threads() -> None:
    assert _on_another_thread() == (0, 0)


def test_what_operators_take_on_their_threads_counts(allocator: Allocator) -> None:
    """Each thread of the backward of attention allocates, see NOTE [threads of operators]."""
    q, k, v = (torch.randn(1, 9, 256, 64) for _ in range(3))
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    call = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, q, q, k, v, out, logsumexp, 0.0, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (cost,) = measure_calls([call], "cpu")
        # on a busy machine the threads may come one after the other
        assert (cost.peak_nbytes, cost.end_nbytes) == max(_hooked(call, allocator) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def _allocate(sizes: Iterator[int]) -> None:
    torch.empty(next(sizes) * KIB, dtype=torch.uint8)


def test_the_most_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of an operator that come one after the other in one run may be there together in the next."""
    for threads, most in ((1, 1), (2, 3)):
        monkeypatch.setattr(torch, "get_num_threads", Mock(return_value=threads))
        (cost,) = measure_calls([partial(_allocate, itertools.chain([5, 1, 3, 2], itertools.repeat(1)))], "cpu")  # the first warms up
        assert (cost.peak_nbytes, cost.end_nbytes) == (most * KIB, 0)


@pytest.mark.usefixtures("either")
def test_measurements_do_not_nest() -> None:
    with PeakMeter("cpu") as outer:
        with pytest.raises(RuntimeError, match="do not nest"), PeakMeter("cpu"):
            pass
        with pytest.raises(RuntimeError, match="do not nest"):
            measure_calls([lambda: None], "cpu")
        kept = torch.empty(KIB, dtype=torch.uint8)
    assert outer.end_nbytes == kept.nbytes


def test_a_running_profiler_is_refused_and_left_alone() -> None:
    with profiler.profile() as running:
        with pytest.raises(RuntimeError, match="profiler is running"), PeakMeter("cpu"):
            pass
        torch.empty(1)
    assert any(event.name == "aten::empty" for event in running.function_events)


@pytest.mark.usefixtures("profiled")
def test_a_profiler_started_inside_is_noticed() -> None:
    def profiled() -> None:
        with profiler.profile():
            torch.empty(1)

    with pytest.raises(RuntimeError, match="nothing inside may start one"), PeakMeter("cpu"):
        profiled()
    runs = iter([lambda: None, profiled])  # harmless while warming up
    with pytest.raises(RuntimeError, match="nothing inside may start one"):
        measure_calls([lambda: next(runs)()], "cpu")
    assert [cost.peak_nbytes for cost in measure_calls([lambda: None], "cpu")] == [0]


@pytest.mark.usefixtures("either")
def test_a_failing_block_or_call_leaves_the_meter_usable() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), PeakMeter("cpu"):
        fail()
    runs = iter([None])  # the second run, which is measured, fails
    with pytest.raises(StopIteration):
        measure_calls([lambda: next(runs)], "cpu")
    assert [cost.peak_nbytes for cost in measure_calls([lambda: None], "cpu")] == [0]


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot measure on meta"):
        PeakMeter("meta")


class _FakeAccelerator:
    """Just enough of `torch.accelerator`: `grow` plays the allocator, `events` is what was called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = self.peak = 1000
        self.synchronized = 0
        names = {"synchronize": self._synchronize, "reset_peak_memory_stats": self._reset}
        numbers = {"memory_allocated": lambda _: self.live, "max_memory_allocated": lambda _: self.peak}
        fakes: dict[str, Callable[..., Any]] = {**names, **numbers, "current_accelerator": lambda check_available: torch.device("cuda")}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.accelerator, name, fake)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: "drawn from")
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: self.restored.append(state))
        self.restored: list[object] = []

    def grow(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _synchronize(self, _: torch.device) -> None:
        self.synchronized += 1

    def _reset(self, _: torch.device) -> None:
        self.peak = self.live


def test_accelerator_statistics_are_read_around_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeAccelerator(monkeypatch)
    fake.grow(5000)
    fake.grow(-5000)
    with PeakMeter("cuda:0") as meter:
        fake.grow(300)
        fake.grow(-100)
        with pytest.raises(RuntimeError, match="do not nest"), PeakMeter("cuda:0"):
            pass
    assert (meter.peak_nbytes, meter.end_nbytes, fake.synchronized) == (300, 200, 2)


def test_accelerator_calls_are_measured_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeAccelerator(monkeypatch)

    def call() -> None:
        fake.grow(300)
        fake.grow(-200)

    first, second = measure_calls([call, lambda: None], "cuda")
    assert isinstance(first, CallCost)
    assert (first.peak_nbytes, first.end_nbytes, second.peak_nbytes, second.end_nbytes) == (300, 100, 0, 0)
    assert fake.synchronized > 4
    assert fake.restored == ["drawn from"]
