"""Precision through the user's door: resuming, loading, kept schedules, and what is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import chunkft_compile
from chunkft_compile.errors import PlanMismatch, TrainingError
from chunkft_compile.module import ChunkedModule
from chunkft_compile.runtime.precision import MASTER
from tests.invariants.harness import compile_quickly
from tests.models import Case, Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
BF16 = Case("mlp bf16", lambda: Mlp().bfloat16(), lambda seed: {name: value.bfloat16() for name, value in vector_batch(seed).items()})
make = partial(AdamW, lr=1e-3)
both = pytest.mark.parametrize("precision", ["master", "stochastic"])


def _train(model: ChunkedModule, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        torch.autograd.backward(compute_loss(model, BF16.batch(seed)))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("update", ["held", "immediate"])
@both
def test_training_goes_on_bit_for_bit_after_a_restart(precision: str, update: str, tmp_path: Path) -> None:
    model = compile_quickly(BF16.build(), PLENTY, precision=precision, update=update, seed=3)
    optimizer = make(model.parameters())
    _train(model, optimizer, range(3))
    generator = model.rounding_generator
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rounding": generator.get_state() if generator else None}
    torch.save(kept, tmp_path / "checkpoint.pt")
    _train(model, optimizer, range(3, 6))

    loaded = torch.load(tmp_path / "checkpoint.pt")
    again = compile_quickly(BF16.build(), PLENTY, precision=precision, update=update)
    other = make(again.parameters())
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    if again.rounding_generator is not None:
        again.rounding_generator.set_state(loaded["rounding"])
    _train(again, other, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    before = loaded["model"]
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_resumed_master_is_more_than_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its masters, the same restart ends elsewhere: the test above would see that they are missing."""
    monkeypatch.setenv("CHUNKFT_GUARD", "0")  # masters that vanish are made again in a step that did not plan for it
    ends = []
    for keep in (True, False):
        model = compile_quickly(BF16.build(), PLENTY, precision="master")
        optimizer = AdamW(model.parameters(), lr=1e-4)
        _train(model, optimizer, range(8))
        if not keep:
            for state in optimizer.state.values():
                state.pop(MASTER)
        _train(model, optimizer, range(8, 24))
        ends.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    assert not torch.equal(*ends)


@both
def test_the_users_random_numbers_are_untouched(precision: str) -> None:
    model = compile_quickly(BF16.build(), PLENTY, precision=precision)
    optimizer = make(model.parameters())
    _train(model, optimizer, range(1))
    before = torch.get_rng_state()
    _train(model, optimizer, range(1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.rounding_generator is None) == (precision == "master")


def test_loaded_weights_win_over_masters() -> None:
    model = compile_quickly(BF16.build(), PLENTY, precision="master")
    optimizer = AdamW(model.parameters(), lr=1e-6)
    _train(model, optimizer, range(2))
    model.load_state_dict({key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()})
    _train(model, optimizer, range(2, 4))
    for value in model.state_dict().values():
        torch.testing.assert_close(value, torch.full_like(value, 0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize("precision", ["plain", "stochastic"])
def test_loaded_masters_are_refused_where_none_are_kept(precision: str) -> None:
    model = compile_quickly(BF16.build(), PLENTY, precision="master")
    optimizer = make(model.parameters())
    _train(model, optimizer, range(1))
    other = compile_quickly(BF16.build(), PLENTY, precision=precision)
    loaded = make(other.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(TrainingError, match=rf'enter\.weight\[0:8\] has an fp32 master, and precision="{precision}" keeps none'):
        _train(other, loaded, range(1))
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@both
def test_an_error_in_the_users_step_leaves_the_weights(precision: str) -> None:
    """It comes after the last group was stepped, and before its weights were rounded."""
    model = compile_quickly(BF16.build(), PLENTY, precision=precision)
    optimizer = AdamW(model.parameters(), lr=1e-1)
    _train(model, optimizer, range(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        _train(model, optimizer, range(1, 2))
    hook.remove()
    optimizer.zero_grad()
    torch.autograd.backward(compute_loss(model, BF16.batch(2)))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    last = model.chunks[-1].param  # earlier groups were done
    assert torch.equal(model.state_dict()[last], before[last])
    optimizer.step()
    assert not torch.equal(model.state_dict()[last], before[last])


@both
def test_parameters_show_nothing_and_the_model_shows_its_weights(precision: str) -> None:
    model = compile_quickly(BF16.build(), PLENTY, precision=precision)
    optimizer = make(model.parameters())
    _train(model, optimizer, range(1))
    assert all(parameter.isnan().all() and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(not value.isnan().any() and value.dtype == torch.bfloat16 for value in model.state_dict().values())


def test_a_kept_schedule_brings_its_precision(tmp_path: Path) -> None:
    planned = compile_quickly(BF16.build(), PLENTY, precision="master")
    first = make(planned.parameters())
    planned.plan(BF16.batch(0)["x"])
    planned.save_schedule(tmp_path / "plan.json")
    model = chunkft_compile.compile(BF16.build(), schedule=tmp_path / "plan.json")
    optimizer = make(model.parameters())
    _train(model, optimizer, range(1))
    assert all(MASTER in state for state in optimizer.state.values())
    del first, optimizer
    other = chunkft_compile.compile(BF16.build(), schedule=tmp_path / "plan.json", precision="stochastic")
    last = make(other.parameters())
    with pytest.raises(PlanMismatch, match="precision: the plan has master, here it is stochastic"):
        other.plan(BF16.batch(0)["x"])
    del last


def test_an_optimizer_that_comes_late_is_held_to_the_plan() -> None:
    """The plan assumed AdamW with masters; SGD needs less of them, and its steps run."""
    model = compile_quickly(BF16.build(), PLENTY, precision="master")
    model.plan(BF16.batch(0)["x"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _train(model, optimizer, range(2))
    assert all(state.keys() == {MASTER} for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("fp8", torch.bfloat16, "precision is plain, master, stochastic, not 'fp8'"),
        ("master", torch.float32, 'precision="master" is for bfloat16 or float16 weights, these are float32'),
        ("stochastic", torch.float16, 'precision="stochastic" rounds to bfloat16'),
    ],
)
def test_what_would_do_nothing_is_refused(precision: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_quickly(Mlp().to(dtype), PLENTY, precision=precision)
