"""Training on an accelerator that raises out of memory at the budget: a simulated one, in a process of its own.

`python -m tests.test_accelerator` does the work there and prints what it saw as JSON; the tests read it.
"""

import copy
import gc
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_compile
from chunkft_compile.planner import Placement, Update
from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.engine import Run
from chunkft_compile.runtime.precision import MASTER
from tests import models
from tests.invariants.by_hand import plan_by_hand
from tests.support.reference import Slice, train
from tests.support.simdev import SimDevice, on_device, report_work, run_beside

pytestmark = pytest.mark.slow

_MIB = 1 << 20
_BLOCK = 512  # what CUDA's allocator rounds up to
_SLOW = 20e6  # bytes per second: a copy of one chunk's state takes longer than its step


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What happened in the other process."""
    return run_beside("tests.test_accelerator")


def test_the_device_shows_a_missing_wait(report: dict[str, Any]) -> None:
    assert report["read without waiting"] == "nan"
    assert report["read after waiting"] == "right"


def test_the_device_shows_an_early_free(report: dict[str, Any]) -> None:
    assert report["freed while copying"] == "nan"
    assert report["freed while copying, recorded"] == "right"


def test_the_device_has_a_capacity(report: dict[str, Any]) -> None:
    assert report["beyond capacity"] == "OutOfMemoryError"


def test_a_broken_promise_stops_the_step(report: dict[str, Any]) -> None:
    assert re.search(r"BACKWARD of segment 1\): \d+ bytes at its peak, where .* \([\d.]+ [kM]B over\)", report["leak"])


def test_plain_training_runs_out_of_memory_at_the_budget(report: dict[str, Any]) -> None:
    assert report["plain"] == "OutOfMemoryError"


@pytest.mark.parametrize("link", ["fast", "slow", "capturable"])
def test_two_sweeps_equal_the_reference_inside_the_capacity(report: dict[str, Any], link: str) -> None:
    run = report[link]
    assert run["steps"] > 1
    assert run["losses"] == pytest.approx(run["reference losses"], rel=1e-4)
    rounding = 1e-3 if link == "capturable" else 1e-4  # its bias corrections are single precision; one update is 1e-2
    assert run["weights differ by"] < rounding  # NaN, where something was read too early, compares as False


def test_immediate_updates_are_plain_training_where_held_ones_do_not_fit(report: dict[str, Any]) -> None:
    run = report["immediate"]
    assert run["steps"] == 1 < report["slow"]["steps"]
    assert run["losses"] == pytest.approx(run["reference losses"], rel=1e-4)
    assert run["weights differ by"] < 1e-4
    assert run["budget"] == report["slow"]["budget"]


def test_weights_leave_a_model_that_was_captured_on_the_device(report: dict[str, Any]) -> None:
    run = report["leaving"]
    assert run["weights away"] > 0 == report["fast"]["weights away"]
    assert run["steps"] < report["fast"]["steps"]
    assert run["weights differ by"] < 1e-4


@pytest.mark.parametrize("link", ["fast", "slow", "immediate", "capturable", "leaving"])
def test_every_step_stays_below_its_prediction(report: dict[str, Any], link: str) -> None:
    run = report[link]
    for measured, predicted in run["peaks"]:
        assert measured <= predicted <= run["budget"]
    for measured, predicted in run["peaks"][run["steps"] :]:  # the first sweep makes the state
        assert predicted <= 1.02 * measured


def test_masters_travel_through_pinned_host_memory(report: dict[str, Any]) -> None:
    """Losses are those of the same training on the CPU; a master that was used before its copy ended would be NaN."""
    run = report["master"]
    assert run["losses"] == pytest.approx(run["losses on the CPU"], rel=5e-3)
    assert run["stand-ins"] == {"device": ["cpu"], "pinned": [True]}
    assert run["masters away"] > 0
    for measured, predicted in run["peaks"]:
        assert measured <= predicted <= run["budget"]
    for measured, predicted in run["peaks"][1:]:
        assert predicted <= 1.02 * measured


@pytest.mark.parametrize("update", ["held", "immediate"])
def test_a_model_larger_than_the_device_is_trained_and_evaluated(report: dict[str, Any], update: str) -> None:
    run = report["streamed"][update]
    assert run["budget"] < run["weights"]
    assert run["away"] > 0
    assert run["losses"] == pytest.approx(run["reference losses"], rel=1e-4)
    assert run["weights differ by"] < 1e-3  # one update is 1e-2
    for measured, predicted in run["peaks"]:
        assert measured <= predicted <= run["budget"]
    assert run["evaluated"][0] == pytest.approx(run["evaluated"][1], rel=1e-4)
    assert 0 < run["longer"] < 20


def test_a_deleted_model_gives_its_memory_back(report: dict[str, Any]) -> None:
    assert report["left behind"] == 0


def test_inactive_state_is_in_pinned_host_memory(report: dict[str, Any]) -> None:
    run = report["fast"]
    assert run["store"] == "HostStore"
    assert run["stored nbytes"] > 0
    assert run["stand-ins"] == {"device": ["cpu"], "pinned": [True]}


def test_resuming_changes_no_bit_and_puts_state_where_it_lives(report: dict[str, Any]) -> None:
    run = report["resumed"]
    assert run["same"]
    assert run["store"] == "HostStore"
    assert run["stand-ins"] == {"device": ["cpu"], "pinned": [True]}
    assert run["resident on"] == ["sim"]
    assert run["loading took"] <= run["largest chunk"] + 4 * _BLOCK  # one tensor of state at a time


# ---- what runs in the other process


def _run_all(device: SimDevice) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = _check_streams(device) | {"plain": _run_plain(device)}
    found["fast"] = _run_chunked(device)
    gc.collect()
    found["leaving"] = _run_chunked(device, weights=None)
    found["leak"] = _run_leaking(device)
    found["left behind"] = _left_behind()
    found["slow"] = _run_chunked(device, link_bytes_per_s=_SLOW)
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, [Update.IMMEDIATE], option="offload")
        found["immediate"] = _run_chunked(device, link_bytes_per_s=_SLOW, update="immediate")
    found["capturable"] = _run_chunked(device, capturable=True)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        plan_by_hand(patch, [Update.HELD] * 2, resident=(1, 2), scattered=True)
        device.configure(link_bytes_per_s=_SLOW)
        found["resumed"] = _resume(Path(directory))
    found["streamed"] = {update: _run_streamed(device, update=update) for update in ("held", "immediate")}
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, [Update.HELD], resident=(0, 2))
        found["master"] = _run_masters(device)
    return found


def _left_behind() -> int:
    """Bytes on the device once nothing is used any more. Autograd's thread for it lets go of its last node some time after backward."""
    deadline = time.monotonic() + 20
    while True:
        gc.collect()
        nbytes = torch.accelerator.memory_allocated()
        if nbytes == 0 or time.monotonic() > deadline:
            return nbytes
        time.sleep(0.05)


def _resume(directory: Path) -> dict[str, Any]:
    """Train, keep, train on; and the same from what was kept."""

    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = chunkft_compile.compile(_model().to("sim"), 10**8)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = build()
    for seed in range(3):
        _train_one(model, optimizer, seed)
    chunkft_compile.save_checkpoint(directory, model, optimizer)
    again, other = build()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    chunkft_compile.load_checkpoint(directory, again, other)
    took = torch.accelerator.max_memory_allocated() - before
    for seed in range(3, 5):
        _train_one(model, optimizer, seed)
        _train_one(again, other, seed)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    resident = [other.state[again.chunks[number].leaf] for number in (1, 2)]
    return {
        "same": all(torch.equal(one.cpu(), two.cpu()) for one, two in pairs),
        "loading took": took,
        "largest chunk": max(chunk.nbytes for chunk in again.chunks),
        "resident on": sorted({state["exp_avg"].device.type for state in resident}),
        **_describe_store(again, other),
    }


def _train_one(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.autograd.backward(model(**on_device(models.token_batch(seed))).loss)
    optimizer.step()
    optimizer.zero_grad()


def _judge(tensor: torch.Tensor, wanted: torch.Tensor) -> str:
    if torch.equal(tensor.cpu(), wanted):
        return "right"
    return "nan" if bool(tensor.isnan().any()) else "wrong"


def _check_streams(device: SimDevice) -> dict[str, Any]:
    """The device itself: what it must show is shown. The first copy takes seconds, so that a busy machine still reads before it ends."""
    torch.zeros(4, device="sim").clone()  # what torch loads at the first call of an operator takes longer than a copy
    device.configure(link_bytes_per_s=2e5)
    stream, done = torch.Stream("sim"), torch.Event("sim")
    host = torch.randn(_MIB // 4).pin_memory()
    found: dict[str, Any] = {}
    with stream:
        copied = host.to("sim", non_blocking=True)
        done.record(stream)
    early = copied.clone()  # an operator, which the link does not slow down
    torch.accelerator.current_stream().wait_event(done)
    found["read after waiting"] = _judge(copied, host)
    found["read without waiting"] = _judge(early, host)
    device.configure(link_bytes_per_s=20e6)
    for name, recorded in (("freed while copying", False), ("freed while copying, recorded", True)):
        source, target = torch.ones(_MIB // 4, device="sim"), torch.zeros(_MIB // 4).pin_memory()
        torch.accelerator.synchronize()
        with stream:
            target.copy_(source, non_blocking=True)
        if recorded:
            source.record_stream(stream)
        del source
        torch.accelerator.synchronize()
        found[name] = _judge(target, torch.ones(_MIB // 4))
    device.configure(capacity=torch.accelerator.memory_allocated() + _MIB)
    try:
        torch.empty(_MIB + 1, dtype=torch.uint8, device="sim")
    except torch.OutOfMemoryError as error:
        found["beyond capacity"] = type(error).__name__
    device.configure()
    return found


def _model() -> nn.Module:
    torch.manual_seed(0)
    return models.llama(hidden_size=32, intermediate_size=64, num_hidden_layers=2).train()


def _budget(model: nn.Module) -> int:
    """Too little for dense gradients and state, which need four times the weights."""
    return int(2.3 * sum(p.nbytes for p in model.parameters()))


def _run_plain(device: SimDevice) -> str:
    """Plain AdamW with the budget as capacity."""
    model = _model()
    budget = _budget(model)
    model.to("sim")
    batch = on_device(models.token_batch())
    device.configure(capacity=budget)
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        torch.autograd.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
    except torch.OutOfMemoryError as error:
        return type(error).__name__
    finally:
        device.configure()
    return "trained"


def _run_chunked(
    device: SimDevice,
    *,
    link_bytes_per_s: float = 0.0,
    capturable: bool = False,
    weights: Sequence[str] | None = ("device",),
    **settings: Any,
) -> dict[str, Any]:
    """At least two sweeps on the device, and the same steps by the reference on the CPU."""
    gc.collect()
    before = torch.accelerator.memory_allocated()
    device.configure(granularity=_BLOCK)
    plain = _model()
    budget = _budget(plain)
    model = chunkft_compile.compile(copy.deepcopy(plain).to("sim"), budget, solve_seconds=1.0, weights=weights, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=capturable)
    batches = [models.token_batch(seed) for seed in range(100)]
    schedule = model.plan(**on_device(batches[0]))
    batches = batches[: max(4, 2 * len(schedule.steps))]
    device.configure(capacity=before + budget, link_bytes_per_s=link_bytes_per_s, granularity=_BLOCK)
    losses, peaks = _steps(model, optimizer, batches, before)
    device.configure()
    steps = [[_slice(model.chunks[n]) for n in step.chunks] for step in schedule.steps]
    expected, trained = train(plain, steps, lambda leaves: torch.optim.AdamW(leaves, lr=1e-2), [[batch] for batch in batches])
    differ = [(tensor.cpu() - trained[name]).abs().max() for name, tensor in model.state_dict().items()]
    return {
        "weights away": sum(weight.device.type == "cpu" for weight in model.module.parameters()),
        "steps": len(schedule.steps),
        "budget": budget,
        "peaks": peaks,
        "losses": losses,
        "reference losses": expected,
        "weights differ by": float(torch.stack(differ).max()),
        **_describe_store(model, optimizer),
    }


def _run_leaking(device: SimDevice) -> str:
    """What a step is told whose backward takes a megabyte more than planned."""
    device.configure(granularity=_BLOCK)
    model = chunkft_compile.compile(_model().to("sim"), 10**7, solve_seconds=1.0)
    optimizer, batch = torch.optim.AdamW(model.parameters()), models.token_batch()
    model.plan(**on_device(batch))
    _step(model, optimizer, batch)
    execute = Run._execute

    def leak(run: Run, instruction: Instruction) -> None:
        execute(run, instruction)
        if (instruction.op, instruction.segment) == (Op.BACKWARD, 1):
            torch.empty(10**6, dtype=torch.uint8, device="sim")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_execute", leak)
        with pytest.raises(chunkft_compile.MemoryPromiseError) as caught:
            _step(model, optimizer, batch)
    return str(caught.value)


def _run_streamed(device: SimDevice, **settings: Any) -> dict[str, Any]:
    """A model on the CPU, larger than the device, for two sweeps; then evaluated, and a batch of another length."""
    gc.collect()
    device.configure(granularity=_BLOCK)
    before = torch.accelerator.memory_allocated()
    torch.manual_seed(0)
    plain = models.llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4).train()
    weights = sum(p.nbytes for p in plain.parameters())
    budget = int(0.9 * weights)
    model = chunkft_compile.compile(copy.deepcopy(plain), budget, device="sim", solve_seconds=1.0, **settings)
    model.to("sim")  # trainers do: weights go as the plan says, and all of them would not fit
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # where gradients are rounding, updates are none
    schedule = model.plan(**on_device(models.token_batch()))
    batches = [models.token_batch(seed) for seed in range(2 * len(schedule.steps))]
    device.configure(capacity=before + budget, link_bytes_per_s=_SLOW, granularity=_BLOCK)
    losses, peaks = _steps(model, optimizer, batches, before)
    with torch.no_grad():
        evaluated = float(model(**on_device(batches[0])).loss)
    steps = [[_slice(model.chunks[n]) for n in step.chunks] for step in schedule.steps]
    expected, state = train(plain, steps, lambda leaves: torch.optim.AdamW(leaves, lr=1e-2, eps=1e-3), [[batch] for batch in batches])
    differ = [(tensor.cpu() - state[name]).abs().max() for name, tensor in model.state_dict().items()]
    plain.load_state_dict(dict(state))
    with torch.no_grad():
        wanted = float(plain(**batches[0]).loss)
    longer = _step(model, optimizer, models.token_batch(99, tokens=12))[2]
    device.configure()
    return {
        "budget": budget,
        "weights": weights,
        "peaks": peaks,
        "losses": losses,
        "reference losses": expected,
        "weights differ by": float(torch.stack(differ).max()),
        "evaluated": [evaluated, wanted],
        "longer": longer,
        "away": sum(place is not Placement.DEVICE for place in schedule.places.weights),
    }


def _run_masters(device: SimDevice) -> dict[str, Any]:
    """bf16 weights with fp32 masters, on the device and on the CPU."""
    before = torch.accelerator.memory_allocated()
    network = models.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2).bfloat16().train()  # scalars are below 2 %
    budget = 20 * sum(p.nbytes for p in network.parameters())
    on_cpu = chunkft_compile.compile(copy.deepcopy(network), budget, precision="master")
    device.configure(granularity=_BLOCK)
    model = chunkft_compile.compile(network.to("sim"), budget, precision="master")
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, on_cpu)]
    model.plan(**on_device(models.token_batch()))
    device.configure(capacity=before + budget, link_bytes_per_s=_SLOW, granularity=_BLOCK)
    losses, expected, peaks = [], [], []
    for seed in range(4):
        measured, predicted, loss = _step(model, optimizers[0], models.token_batch(seed))
        peaks.append((measured - before, predicted))
        losses.append(loss)
        wanted = on_cpu(**models.token_batch(seed)).loss
        wanted.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        expected.append(wanted.item())
    device.configure()
    masters = [state[MASTER] for state in optimizers[0].state.values()]
    return {
        "budget": budget,
        "peaks": peaks,
        "losses": losses,
        "losses on the CPU": expected,
        "masters away": sum(master.device.type == "cpu" for master in masters),
        **_describe_store(model, optimizers[0]),
    }


def _slice(chunk: Any) -> Slice:
    return chunk.param, chunk.start, chunk.stop


def _steps(
    model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[models.Batch], before: int
) -> tuple[list[float], list[tuple[int, int]]]:
    """Losses, and measured and predicted peaks above the bytes that were there `before`."""
    done = [_step(model, optimizer, batch) for batch in batches]
    return [loss for _, _, loss in done], [(measured - before, predicted) for measured, predicted, _ in done]


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: models.Batch) -> tuple[int, int, float]:
    """One ordinary step: measured peak, predicted peak, loss."""
    inputs = on_device(batch)
    predicted = model.progress.predicted_nbytes
    torch.accelerator.reset_peak_memory_stats()
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return torch.accelerator.max_memory_allocated(), predicted, float(loss.detach())


def _describe_store(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Where the state of the chunks is that are not on the device."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    away = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    return {
        "store": type(model._session.stores[Placement.HOST]).__name__,
        "stored nbytes": model.store_nbytes,
        "stand-ins": {
            "device": sorted({tensor.device.type for tensor in away}),
            "pinned": sorted({tensor.is_pinned() for tensor in away}),
        },
    }


if __name__ == "__main__":
    report_work(_run_all)
