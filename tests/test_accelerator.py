"""Training on an accelerator that raises out of memory at the budget: a simulated one, in a process of its own.

`python -m tests.test_accelerator` does the work there and prints what it saw as JSON; the tests read it.
"""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_compile
from chunkft_compile.planner import Update
from chunkft_compile.runtime.precision import MASTER
from tests import models
from tests.invariants.by_hand import plan_by_hand
from tests.support.reference import Slice, train
from tests.support.simdev import CompilerMissingError, SimDevice, build, register

pytestmark = pytest.mark.slow

_MIB = 1 << 20
_BLOCK = 512  # what CUDA's allocator rounds up to
_SLOW = 20e6  # bytes per second: a copy of one chunk's state takes longer than its step


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What happened in the other process."""
    try:
        build()
    except CompilerMissingError as error:
        pytest.skip(str(error))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.test_accelerator"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_device_shows_a_missing_wait(report: dict[str, Any]) -> None:
    assert report["read without waiting"] == "nan"
    assert report["read after waiting"] == "right"


def test_the_device_shows_an_early_free(report: dict[str, Any]) -> None:
    assert report["freed while copying"] == "nan"
    assert report["freed while copying, recorded"] == "right"


def test_the_device_has_a_capacity(report: dict[str, Any]) -> None:
    assert report["beyond capacity"] == "OutOfMemoryError"


def test_plain_training_runs_out_of_memory_at_the_budget(report: dict[str, Any]) -> None:
    assert report["plain"] == "OutOfMemoryError"


@pytest.mark.parametrize("link", ["fast", "slow"])
def test_two_sweeps_equal_the_reference_inside_the_capacity(report: dict[str, Any], link: str) -> None:
    run = report[link]
    assert run["steps"] > 1
    assert run["losses"] == pytest.approx(run["reference losses"], rel=1e-4)
    assert run["weights differ by"] < 1e-4  # NaN, where something was read too early, compares as False


def test_immediate_updates_are_plain_training_where_held_ones_do_not_fit(report: dict[str, Any]) -> None:
    run = report["immediate"]
    assert run["steps"] == 1 < report["slow"]["steps"]
    assert run["losses"] == pytest.approx(run["reference losses"], rel=1e-4)
    assert run["weights differ by"] < 1e-4
    assert run["budget"] == report["slow"]["budget"]


@pytest.mark.parametrize("link", ["fast", "slow", "immediate"])
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


def test_a_deleted_model_gives_its_memory_back(report: dict[str, Any]) -> None:
    assert report["left behind"] == 0


def test_inactive_state_is_in_pinned_host_memory(report: dict[str, Any]) -> None:
    run = report["fast"]
    assert run["store"] == "HostStore"
    assert run["stored nbytes"] > 0
    assert run["stand-ins"] == {"device": ["cpu"], "pinned": [True]}


# ---- what runs in the other process


def _main() -> None:
    device = register()
    torch.manual_seed(0)
    found: dict[str, Any] = _check_streams(device) | {"plain": _run_plain(device)}
    found["fast"] = _run_chunked(device)
    gc.collect()
    found["left behind"] = torch.accelerator.memory_allocated()
    found["slow"] = _run_chunked(device, link_bytes_per_s=_SLOW)
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, [Update.IMMEDIATE], option="offload")
        found["immediate"] = _run_chunked(device, link_bytes_per_s=_SLOW, update="immediate")
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, [Update.HELD], resident=(0, 2))
        found["master"] = _run_masters(device)
    print(json.dumps(found))


def _judge(tensor: torch.Tensor, wanted: torch.Tensor) -> str:
    if torch.equal(tensor.cpu(), wanted):
        return "right"
    return "nan" if bool(tensor.isnan().any()) else "wrong"


def _check_streams(device: SimDevice) -> dict[str, Any]:
    """The device itself: what it must show is shown. The first copy takes seconds, so that a busy machine still reads before it ends."""
    bool(torch.zeros(4, device="sim").isnan().any())  # what torch loads at the first call of an operator takes longer than a copy
    device.configure(link_bytes_per_s=2e5)
    stream, done = torch.Stream("sim"), torch.Event("sim")
    host = torch.randn(_MIB // 4).pin_memory()
    found: dict[str, Any] = {}
    with stream:
        copied = host.to("sim", non_blocking=True)
        done.record(stream)
    found["read without waiting"] = "nan" if bool(copied.isnan().any()) else "right"
    torch.accelerator.current_stream().wait_event(done)
    found["read after waiting"] = _judge(copied, host)
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


def _on_device(batch: models.Batch) -> dict[str, torch.Tensor]:
    return {name: tensor.to("sim") for name, tensor in batch.items()}


def _run_plain(device: SimDevice) -> str:
    """Plain AdamW with the budget as capacity."""
    model = _model()
    budget = _budget(model)
    model.to("sim")
    batch = _on_device(models.token_batch())
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


def _run_chunked(device: SimDevice, *, link_bytes_per_s: float = 0.0, **settings: Any) -> dict[str, Any]:
    """At least two sweeps on the device, and the same steps by the reference on the CPU."""
    gc.collect()
    before = torch.accelerator.memory_allocated()
    device.configure(granularity=_BLOCK)
    plain = _model()
    budget = _budget(plain)
    model = chunkft_compile.compile(copy.deepcopy(plain).to("sim"), budget, solve_seconds=1.0, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [models.token_batch(seed) for seed in range(100)]
    schedule = model.plan(**_on_device(batches[0]))
    batches = batches[: max(4, 2 * len(schedule.steps))]
    device.configure(capacity=before + budget, link_bytes_per_s=link_bytes_per_s, granularity=_BLOCK)
    losses, peaks = [], []
    for batch in batches:
        measured, predicted, loss = _step(model, optimizer, batch)
        peaks.append((measured - before, predicted))
        losses.append(loss)
    device.configure()
    steps = [[_slice(model.chunks[n]) for n in step.chunks] for step in schedule.steps]
    expected, weights = train(plain, steps, lambda leaves: torch.optim.AdamW(leaves, lr=1e-2), [[batch] for batch in batches])
    differ = [(tensor.cpu() - weights[name]).abs().max() for name, tensor in model.state_dict().items()]
    return {
        "steps": len(schedule.steps),
        "budget": budget,
        "peaks": peaks,
        "losses": losses,
        "reference losses": expected,
        "weights differ by": float(torch.stack(differ).max()),
        **_describe_store(model, optimizer),
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
    model.plan(**_on_device(models.token_batch()))
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


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: models.Batch) -> tuple[int, int, float]:
    """One ordinary step: measured peak, predicted peak, loss."""
    inputs = _on_device(batch)
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
        "store": type(model._session.store).__name__,
        "stored nbytes": model.store_nbytes,
        "stand-ins": {
            "device": sorted({tensor.device.type for tensor in away}),
            "pinned": sorted({tensor.is_pinned() for tensor in away}),
        },
    }


if __name__ == "__main__":
    _main()
