"""`generate` and other methods of a model whose weights live beside an accelerator: a simulated one, in a process of its own.

`python -m tests.test_accelerator_methods` does the work there and prints what it saw as JSON; the tests read it.
"""

import copy
import gc
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_compile
from chunkft_compile import elsewhere
from chunkft_compile.errors import TrainingError
from chunkft_compile.runtime.chunks import set_data
from tests import models
from tests.support.simdev import SimDevice, on_device, report_work, run_beside

pytestmark = pytest.mark.slow

_BLOCK = 512  # what CUDA's allocator rounds up to
_SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What happened in the other process."""
    return run_beside("tests.test_accelerator_methods")


@pytest.mark.parametrize("room", ["tight", "wide"])
def test_it_generates_what_the_same_weights_generate_on_the_cpu(report: dict[str, Any], room: str) -> None:
    run = report[room]
    assert run["away"] > 0
    assert run["words"] == run["words on the CPU"]
    assert run["device"] == "sim"
    assert run["peak"] <= run["budget"]
    assert run["left behind"] == 0


def test_weights_come_once_where_the_budget_has_room_and_for_every_token_where_not(report: dict[str, Any]) -> None:
    wide, tight = report["wide"], report["tight"]
    assert wide["came"] == wide["away"]
    assert tight["budget"] < tight["weights"]
    assert tight["away"] < tight["came"] < _SETTINGS["max_new_tokens"] * tight["away"]  # some stay


def test_any_method_that_runs_the_model_sees_its_weights(report: dict[str, Any]) -> None:
    for run in (report["tight"], report["wide"]):
        assert run["scored"] == pytest.approx(run["scored on the CPU"], rel=1e-4)


def test_a_method_that_runs_it_with_gradients_is_refused_and_leaves_nothing(report: dict[str, Any]) -> None:
    for run in (report["tight"], report["wide"]):
        assert "call the compiled model itself to train" in run["with gradients"]
        assert all(0 < loss < 20 for loss in run["losses"])  # it trains on
        assert run["still away"] == run["away"]


def test_other_methods_and_the_device_are_as_they_were(report: dict[str, Any]) -> None:
    run = report["tight"]
    assert run["asked"] == 0  # a method that runs nothing brings nothing
    assert run["signature"]
    assert run["model.device"] == "sim"


# ---- what runs in the other process


def _run_both(device: SimDevice) -> dict[str, Any]:
    return {"tight": _run(device, 0.9), "wide": _run(device, 3.0, weights=["host"])}


def _run(device: SimDevice, factor: float, **settings: Any) -> dict[str, Any]:
    """Train a model in `factor` times the bytes of its weights, call its methods, and train on."""
    gc.collect()
    device.configure(granularity=_BLOCK)
    before = torch.accelerator.memory_allocated()
    torch.manual_seed(0)
    plain = models.llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4).train()
    weights = sum(p.nbytes for p in plain.parameters())
    budget = int(factor * weights)
    model = chunkft_compile.compile(copy.deepcopy(plain), budget, device="sim", solve_seconds=1.0, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.plan(**on_device(models.token_batch()))
    device.configure(capacity=before + budget, granularity=_BLOCK)
    losses = [_step(model, optimizer, 0)]
    plain.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    gc.collect()
    found = _generate(model, plain, before) | _call(model, plain) | _ask(model)
    losses.append(_step(model, optimizer, 1))
    device.configure()
    away = sum(tensor.device.type == "cpu" for tensor in model.module.parameters())
    return found | {"budget": budget, "weights": weights, "losses": losses, "still away": away}


def _step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = model(**on_device(models.token_batch(seed))).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _prompt() -> torch.Tensor:
    return models.token_batch(7)["input_ids"][:1, :4]


class _Counter:
    """Counts weights that come to the device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        patch.setattr(elsewhere, "set_data", self._count)

    def _count(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        self.count += data.device.type == "sim"
        set_data(tensor, data)


def _generate(model: Any, plain: nn.Module, before: int) -> dict[str, Any]:
    away = sum(tensor.device.type == "cpu" for tensor in model.module.parameters())
    live = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    with pytest.MonkeyPatch.context() as patch:
        counter = _Counter(patch)
        words = model.generate(_prompt().to("sim"), **_SETTINGS)
    found = {"peak": torch.accelerator.max_memory_allocated() - before, "device": words.device.type, "words": words.tolist()}
    del words
    gc.collect()
    found |= {"left behind": torch.accelerator.memory_allocated() - live, "away": away, "came": counter.count}
    return found | {"words on the CPU": plain.generate(_prompt(), **_SETTINGS).tolist()}  # type: ignore[operator]


def _call(model: Any, plain: nn.Module) -> dict[str, Any]:
    """A method of its own that runs it, without gradients and with."""
    model.module.score = MethodType(_score, model.module)
    with torch.no_grad():
        found: dict[str, Any] = {"scored": float(model.score(_prompt().to("sim"))), "scored on the CPU": float(_score(plain, _prompt()))}
    found["with gradients"] = ""
    try:
        model.score(_prompt().to("sim"))
    except TrainingError as error:
        found["with gradients"] = str(error)
    del model.module.score
    return found


def _score(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return found


def _ask(model: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        counter = _Counter(patch)
        model.num_parameters()
    same = inspect.signature(model.generate) == inspect.signature(model.module.generate)
    return {"asked": counter.count, "signature": same, "model.device": model.device.type}


if __name__ == "__main__":
    report_work(_run_both)
