"""Recording on an accelerator, a simulated one: instructions are timed by events that nobody waits for.

`python -m tests.test_accelerator_recording` does the work in a process of its own and prints what it saw as JSON; the tests read it.
"""

import gc
import hashlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import chunkft_compile
from chunkft_compile.planner import Plan, Update, from_json
from chunkft_compile.reports.runs import compare, read_run
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.step_record import Clock, StepRecord, has_passed, us_between
from tests import models
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.runtime.test_guard import PROGRAM
from tests.support.simdev import SimDevice, register, run_beside

pytestmark = pytest.mark.slow

_SECONDS = 1.0  # that the device is busy with one copy
_NBYTES = 1 << 20
_BLOCK = 512
_SLOW = 20e6  # bytes per second
_UPDATES = (Update.HELD, Update.IMMEDIATE)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What happened in the other process."""
    return run_beside("tests.test_accelerator_recording")


def test_a_mark_is_made_at_once_and_passes_with_the_device(report: dict[str, Any]) -> None:
    found = report["clock"]
    assert found["marking took"] < _SECONDS / 2
    assert not found["passed before"]
    assert found["passed after"]
    assert found["us"] > 0.9e6 * _SECONDS


def test_what_a_busy_device_has_yet_to_do_is_not_waited_for(report: dict[str, Any]) -> None:
    found = report["step"]
    assert found["noting took"] < _SECONDS / 2
    assert not found["passed before"]
    assert found["forward us"] > 0.9e6 * _SECONDS
    assert found["us"] == pytest.approx([found["forward us"], 0, 0, 0, 0, 0], abs=0.1e6 * _SECONDS)


def test_training_is_the_same_with_a_recording(report: dict[str, Any]) -> None:
    plain, recorded = report["plain"], report["at least"]
    assert plain["losses"] == recorded["losses"]
    assert plain["digest"] == recorded["digest"]
    assert plain["peak"] == recorded["peak"]  # nobody has reset the user's statistic
    assert recorded["synchronized"] == 0


@pytest.mark.parametrize("memory", ["at least", "exact"])
def test_peaks_are_those_that_were_planned(report: dict[str, Any], memory: str) -> None:
    found = report[memory]
    assert found["memory"] == memory
    assert [step["sweeps"] for step in found["steps"]] == [3] * len(_UPDATES)
    for step in found["steps"]:
        assert 0 < step["measured_nbytes"] <= step["planned_nbytes"]
        assert all(instant["measured_nbytes"] <= instant["planned_nbytes"] for instant in step["instants"])
    if memory == "exact":
        fullest = max(found["steps"], key=lambda step: int(step["planned_nbytes"]))
        assert fullest["measured_nbytes"] == fullest["planned_nbytes"]


def test_every_step_is_there_with_its_times_and_traffic(report: dict[str, Any]) -> None:
    found = report["at least"]
    assert found["written"] == list(range(3 * len(_UPDATES)))
    assert all(step["measured_us"] > 0 for step in found["steps"])
    # copies of the last step may end after it
    assert all(found["traffic"][way] / 2 < found["moved"][way] <= found["traffic"][way] for way in range(2))


# ---- what runs in the other process


def _main() -> None:
    device = register()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        Workshop().open(patch)
        found = {"clock": _check_clock(device), "step": _check_step(device)}
        plan_by_hand(patch, _UPDATES, away=True)
        device.configure(link_bytes_per_s=_SLOW, granularity=_BLOCK)
        found["plain"] = _train(None)
        found["at least"] = _train(Path(directory))
        patch.setenv("CHUNKFT_DEBUG", "2")
        found["exact"] = _train(Path(directory) / "exact")
        print(json.dumps(found))


def _keep_busy(host: torch.Tensor) -> torch.Tensor:
    return host.to("sim", non_blocking=True)


def _check_clock(device: SimDevice) -> dict[str, Any]:
    torch.zeros(4, device="sim").clone()
    host = torch.zeros(_NBYTES, dtype=torch.uint8).pin_memory()
    device.configure(link_bytes_per_s=_NBYTES / _SECONDS)
    clock, began = Clock(torch.device("sim", 0)), time.monotonic()
    start = clock.mark()
    kept = _keep_busy(host)
    stop = clock.mark()
    took, passed = time.monotonic() - began, has_passed(stop)
    torch.accelerator.synchronize()
    del kept
    device.configure()
    return {"marking took": took, "passed before": passed, "passed after": has_passed(stop), "us": us_between(start, stop)}


def _check_step(device: SimDevice) -> dict[str, Any]:
    host = torch.zeros(_NBYTES, dtype=torch.uint8).pin_memory()
    device.configure(link_bytes_per_s=_NBYTES / _SECONDS)
    record, began = StepRecord(PROGRAM, Clock(torch.device("sim", 0))), time.monotonic()
    watch = record.watch(Watch())
    watch.anchor(0)
    kept = _keep_busy(host)
    watch.check(0)
    watch.anchor(1)
    watch.check(1)
    watch.begin_update(PROGRAM.instructions[2:])
    for place in range(4):
        watch.check(watch.number_of(place))
    took, passed = time.monotonic() - began, record.has_passed()
    record.wait()
    found = record.took()
    del kept
    device.configure()
    assert found.complete
    return {"noting took": took, "passed before": passed, "us": found.us, "forward us": found.forward_us}


def _train(directory: Path | None) -> dict[str, Any]:
    """Three sweeps, recorded in `directory` if there is one."""
    gc.collect()
    torch.manual_seed(0)
    model = chunkft_compile.compile(models.llama(hidden_size=32).train(), 10**7, device="sim", update="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls = 0
    synchronize = torch.accelerator.synchronize

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        synchronize(*args, **kwargs)

    batches = [{name: tensor.to("sim") for name, tensor in models.token_batch(seed).items()} for seed in range(3 * len(_UPDATES))]
    model.plan(**batches[0])
    torch.accelerator.reset_peak_memory_stats()
    base, losses, found = torch.accelerator.memory_allocated(), [], dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "synchronize", count)
        if directory is None:
            losses = [_step(model, optimizer, batch) for batch in batches]
        else:
            directory.mkdir(exist_ok=True)
            with chunkft_compile.record(model, directory / "run.jsonl"):
                losses = [_step(model, optimizer, batch) for batch in batches]
    peak = torch.accelerator.max_memory_allocated() - base
    if directory is not None:
        model.save_schedule(directory / "plan.json")
        run = read_run(directory / "run.jsonl")
        compared = compare(from_json((directory / "plan.json").read_text(), Plan), run)
        moved = [sum(step.traffic.read_nbytes for step in run.steps), sum(step.traffic.written_nbytes for step in run.steps)]
        found |= {
            "memory": run.header.memory,
            "steps": [asdict(step) for step in compared.steps],
            "written": [step.step for step in run.steps],
            "moved": moved,
            "traffic": [model.traffic.read_nbytes, model.traffic.written_nbytes],
        }
    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
    return found | {"losses": losses, "digest": digest, "peak": peak, "synchronized": calls}


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    loss = model(**batch).loss
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    _main()
