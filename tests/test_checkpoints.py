"""What a checkpoint holds and gives back, under the same budget and others; and when it cannot be made."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, NAdam, Optimizer

from chunkft_compile import (
    CheckpointError,
    ChunkedModule,
    TrainingError,
    compile,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from chunkft_compile.planner import Update
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Mlp, Tagger, compute_loss, vector_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
NARROW = 6_000  # chunks of at most 128 bytes: half of the layer in the middle
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


def _model(budget: int = PLENTY, **settings: Any) -> ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(Mlp(), budget, **settings)


def _adamw(model: ChunkedModule) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def _train(model: ChunkedModule, optimizer: Optimizer, seeds: Sequence[int], *, rows: int = 4) -> None:
    for seed in seeds:
        torch.autograd.backward(compute_loss(model, vector_batch(seed, rows=rows)))
        optimizer.step()
        optimizer.zero_grad()


def _same_weights(model: nn.Module, other: nn.Module, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=rtol, atol=atol)


def test_weights_are_plain_safetensors_with_tied_ones_once(tmp_path: Path) -> None:
    model = compile_quickly(Tagger(tied=True), PLENTY)
    checkpoint = save_checkpoint(tmp_path, model, _adamw(model))
    kept = load_file(checkpoint / "weights-00001.safetensors")
    assert set(kept) == set(dict(model.module.named_parameters())) | set(dict(model.module.named_buffers()))
    assert "head.weight" not in kept
    other = compile_quickly(Tagger(tied=True), PLENTY)
    load_checkpoint(checkpoint, other, _adamw(other))
    _same_weights(other, model)
    untied = compile_quickly(Tagger(), PLENTY)
    with pytest.raises(CheckpointError, match=r"another model: head.weight is missing there and float32"):
        load_checkpoint(checkpoint, untied, _adamw(untied))


def test_weights_kept_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    whole, resumed = _model(), _model()
    optimizer, again = _adamw(whole), _adamw(resumed)
    _train(whole, optimizer, [0])
    checkpoint = save_checkpoint(tmp_path, whole, optimizer, weights=False)
    assert not list(checkpoint.glob("weights-*"))
    kept = {name: weight.clone() for name, weight in whole.state_dict().items()}
    _train(whole, optimizer, [1, 2])
    resumed.load_state_dict(kept)
    load_checkpoint(tmp_path, resumed, again)
    _train(resumed, again, [1, 2])
    _same_weights(resumed, whole)
    assert resumed.progress == whole.progress


def test_frozen_weights_and_buffers_are_in_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    compiled = compile_quickly(model, PLENTY)
    expected = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    save_checkpoint(tmp_path, compiled, _adamw(compiled))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    load_checkpoint(tmp_path, compiled, _adamw(compiled))
    assert all(torch.equal(*pair) for pair in zip(expected, (*model.parameters(), *model.buffers()), strict=True))


class _Counting(nn.Linear):
    """Keeps something beside its tensors."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_modules_get_their_own_state_back(tmp_path: Path) -> None:
    counting = _Counting(6, 3)
    counting.seen = 5
    model = compile_quickly(nn.Sequential(counting), PLENTY)
    save_checkpoint(tmp_path, model, _adamw(model))
    counting.seen = 0
    load_checkpoint(tmp_path, model, _adamw(model))
    assert counting.seen == 5
    plain = compile_quickly(nn.Sequential(nn.Linear(6, 3)), PLENTY)
    with pytest.raises(CheckpointError, match="another model: other modules keep a state of their own"):
        load_checkpoint(tmp_path, plain, _adamw(plain))


def test_names_of_state_are_parameters_and_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,))
    model = _model(NARROW)
    optimizer = _adamw(model)
    _train(model, optimizer, [0])
    checkpoint = save_checkpoint(tmp_path, model, optimizer)
    kept = load_file(checkpoint / "chunks-00001.safetensors")
    assert {"middle.weight[0:4]/exp_avg", "middle.weight[4:8]/exp_avg_sq", "middle.weight[4:8]/step"} <= set(kept)
    assert not any(name.endswith(".grad") for name in kept)


@pytest.mark.parametrize("budgets", [(NARROW, PLENTY), (PLENTY, NARROW)])
def test_another_budget_between_sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budgets: tuple[int, int]) -> None:
    plan_by_hand(monkeypatch, (HELD,))
    whole = _model(budgets[0])
    optimizer = _adamw(whole)
    _train(whole, optimizer, range(3))
    save_checkpoint(tmp_path, whole, optimizer)
    _train(whole, optimizer, range(3, 6))
    model = _model(budgets[1])
    assert len(model.chunks) != len(whole.chunks)
    other = _adamw(model)
    load_checkpoint(tmp_path, model, other)
    _train(model, other, range(3, 6))
    _same_weights(model, whole, rtol=1e-5, atol=1e-7)
    assert model.progress.sweep == whole.progress.sweep == 6
    assert {state["step"].item() for state in other.state.values()} == {6}


def test_another_budget_in_the_middle_of_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chunks all of whose rows were trained are not trained again; the others go on with the larger count."""
    plan_by_hand(monkeypatch, (HELD, HELD), scattered=True)
    narrow = _model(NARROW)
    optimizer = _adamw(narrow)
    _train(narrow, optimizer, range(3))
    trained = {narrow.chunks[number].name for number in narrow._session.planned.state.trained}
    assert len({name in trained for name in ("middle.weight[0:4]", "middle.weight[4:8]")}) == 2
    save_checkpoint(tmp_path, narrow, optimizer)
    wide = _model()
    other = _adamw(wide)
    with pytest.warns(UserWarning, match=r"chunks join rows .* go on with the larger number: .*middle.weight\[0:8\] \(1 and 2 times\)"):
        load_checkpoint(tmp_path, wide, other)
    wide.plan(vector_batch()["x"])
    again = {chunk.name for number, chunk in enumerate(wide.chunks) if number not in wide._session.planned.state.trained}
    assert "middle.weight[0:8]" in again
    assert again < {chunk.name for chunk in wide.chunks}
    assert set(wide.progress.active) <= again
    middle = next(chunk.leaf for chunk in wide.chunks if chunk.name == "middle.weight[0:8]")
    parts = [optimizer.state[chunk.leaf]["exp_avg"] for chunk in narrow.chunks if chunk.param == "middle.weight"]
    assert torch.equal(other.state[middle]["exp_avg"], torch.cat(parts))
    assert other.state[middle]["step"].item() == 2


@pytest.mark.parametrize(
    ("optimizing", "message"),
    [(Adafactor, "the optimizer state col_var of enter.weight belongs to whole chunks"), (NAdam, "the optimizer state mu_product of")],
)
def test_state_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optimizing: Any, message: str) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD), scattered=True)
    narrow = _model(NARROW)
    optimizer = optimizing(narrow.parameters(), lr=1e-2)
    _train(narrow, optimizer, range(3))
    save_checkpoint(tmp_path, narrow, optimizer)
    wide = _model()
    other, before = optimizing(wide.parameters(), lr=1e-2), [parameter.clone() for parameter in wide.parameters()]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, wide, other)
    assert all(torch.equal(*pair) for pair in zip(before, wide.parameters(), strict=True))
    assert not other.state


def test_rows_of_which_some_were_never_trained_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD), scattered=True)
    narrow = _model(NARROW)
    optimizer = _adamw(narrow)
    _train(narrow, optimizer, [0])
    save_checkpoint(tmp_path, narrow, optimizer)
    wide = _model()
    with pytest.raises(CheckpointError, match="has none, it was never trained; resume under the budget of the checkpoint until a whole"):
        load_checkpoint(tmp_path, wide, _adamw(wide))


def test_the_solver_is_not_asked_again_even_for_another_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = _model()
    optimizer = _adamw(model)
    _train(model, optimizer, [0])
    save_checkpoint(tmp_path, model, optimizer)
    monkeypatch.delattr("chunkft_compile.solving.plans")
    other = _model()
    again = _adamw(other)
    load_checkpoint(tmp_path, other, again)
    _train(other, again, [1], rows=3)
    _train(model, optimizer, [1], rows=3)
    _same_weights(other, model)
    assert other.progress == model.progress


def test_other_choices_plan_again_and_finish_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = _model()
    optimizer = _adamw(model)
    _train(model, optimizer, [0])
    rest = set(model.progress.active)
    save_checkpoint(tmp_path, model, optimizer)
    other = _model(PLENTY + 1)
    again = _adamw(other)
    with caplog.at_level(logging.INFO, "chunkft_compile"):
        load_checkpoint(tmp_path, other, again)
    assert f"planning again: the checkpoint was planned for budget_nbytes={PLENTY} (here {PLENTY + 1})" in caplog.text
    other.plan(vector_batch()["x"])
    assert set(other.progress.active) == rest


def test_another_torch_plans_again_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = _model()
    optimizer = _adamw(model)
    _train(model, optimizer, [0])
    save_checkpoint(tmp_path, model, optimizer)
    other = _model()
    load_checkpoint(tmp_path, other, _adamw(other))
    monkeypatch.setattr("chunkft_compile.solving.torch.__version__", "9.9")
    with pytest.warns(UserWarning, match=r"(?s)planning again, .*torch: the plan has .*, here it is 9.9"):
        other.plan(vector_batch()["x"])
    assert other.progress.step == 1


def test_gradients_between_backwards_need_their_schedule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = _model(accumulation=True)
    optimizer = _adamw(model)
    torch.autograd.backward(compute_loss(model, vector_batch()))
    save_checkpoint(tmp_path, model, optimizer)
    other = _model()
    with pytest.raises(CheckpointError, match=r"between two backwards of one step.*accumulation=True \(here False\)"):
        load_checkpoint(tmp_path, other, _adamw(other))
    same = _model(accumulation=True)
    again = _adamw(same)
    load_checkpoint(tmp_path, same, again)
    with pytest.raises(TrainingError, match=r"there is no batch yet to know the plan by; call model.plan\(\*\*batch\) first"):
        again.step()
    monkeypatch.setattr("chunkft_compile.solving.torch.__version__", "9.9")
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="planning again"),
            pytest.raises(TrainingError, match=r"call optimizer.zero_grad\(\) to drop them and go on"),
        ):
            same.plan(vector_batch()["x"])
    again.zero_grad()
    with pytest.warns(UserWarning, match="planning again"):
        _train(same, again, [0])


def test_several_backwards_per_step_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that found out at its second backward goes on with the plan that it made then."""
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = _model()
    optimizer = _adamw(model)
    for seed in range(2):
        torch.autograd.backward(compute_loss(model, vector_batch(seed)))
    optimizer.step()
    optimizer.zero_grad()
    save_checkpoint(tmp_path, model, optimizer)
    monkeypatch.delattr("chunkft_compile.solving.plans")
    other = _model()
    again = _adamw(other)
    load_checkpoint(tmp_path, other, again)
    _train(other, again, [2])
    assert other.problem is not None
    assert other.problem.accumulating


def test_a_load_drops_what_is_under_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (IMMEDIATE,))
    model = _model(update="immediate")
    optimizer = _adamw(model)
    _train(model, optimizer, [0])
    save_checkpoint(tmp_path, model, optimizer)
    _train(model, optimizer, [1])
    expected = [parameter.clone() for parameter in model.parameters()]
    torch.autograd.backward(compute_loss(model, vector_batch(2)))  # applied, and its step never comes
    load_checkpoint(tmp_path, model, optimizer)
    _train(model, optimizer, [1])
    assert all(torch.equal(*pair) for pair in zip(expected, model.parameters(), strict=True))


def test_gradients_that_were_used_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,))
    model = _model()
    optimizer = _adamw(model)
    torch.autograd.backward(compute_loss(model, vector_batch()))
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    save_checkpoint(tmp_path, model, optimizer)
    other = _model()
    again = _adamw(other)
    load_checkpoint(tmp_path, other, again)
    optimizer.zero_grad()
    _train(model, optimizer, [1])
    _train(other, again, [1])
    _same_weights(other, model)


def test_a_scaler_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,))
    model = _model()
    optimizer = _adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def train(model: ChunkedModule, optimizer: Optimizer, scaler: Any, seed: int) -> None:
        torch.autograd.backward(scaler.scale(compute_loss(model, vector_batch(seed))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    train(model, optimizer, scaler, 0)
    save_checkpoint(tmp_path, model, optimizer, scaler=scaler)
    other = _model()
    again, fresh = _adamw(other), torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(tmp_path, other, again, scaler=fresh)
    assert fresh.get_scale() == scaler.get_scale() == 16.0
    train(model, optimizer, scaler, 1)
    train(other, again, fresh, 1)
    _same_weights(other, model)
    model.chunks[0].leaf.grad = torch.full_like(model.chunks[0].leaf, torch.inf)
    with pytest.raises(TrainingError, match=r"not finite, as after a step that the scaler skipped; call optimizer.zero_grad\(\) first"):
        save_checkpoint(tmp_path, model, optimizer, scaler=scaler)


def test_two_optimizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also between their steps: the one that was stepped is not stepped again."""
    plan_by_hand(monkeypatch, (HELD, HELD))

    def build() -> tuple[ChunkedModule, list[Optimizer]]:
        model = _model()
        leaves = list(model.parameters())
        return model, [AdamW(leaves[::2], lr=1e-2), SGD(leaves[1::2], lr=0.1, momentum=0.9)]

    model, optimizers = build()
    torch.autograd.backward(compute_loss(model, vector_batch()))
    optimizers[0].step()
    save_checkpoint(tmp_path, model, optimizers)
    other, again = build()
    load_checkpoint(tmp_path, other, again)
    other.plan(vector_batch()["x"])
    for one, pair in ((model, optimizers), (other, again)):
        pair[1].step()
        for optimizer in pair:
            optimizer.zero_grad()
        torch.autograd.backward(compute_loss(one, vector_batch(1)))
        for optimizer in pair:
            optimizer.step()
    _same_weights(other, model)
    assert other.progress == model.progress
    with pytest.raises(CheckpointError, match="trained with AdamW, SGD, and here is SGD, AdamW; build the same, in this order"):
        load_checkpoint(tmp_path, other, again[::-1])
    with pytest.raises(ValueError, match=r"none of the optimizers given holds .*: pass all that train the model, as a list"):
        save_checkpoint(tmp_path, model, optimizers[0])


def test_groups_keep_their_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,))

    def build(*, swapped: bool = False) -> tuple[ChunkedModule, Optimizer]:
        model = _model()
        biases = [chunk.leaf for chunk in model.chunks if chunk.param.endswith("bias")]
        matrices = [chunk.leaf for chunk in model.chunks if chunk.param.endswith("weight")]
        groups: Any = [{"params": matrices}, {"params": biases, "weight_decay": 0.0}]
        return model, AdamW(groups[::-1] if swapped else groups, lr=1e-2)

    model, optimizer = build()
    optimizer.param_groups[1]["lr"] = 0.5
    save_checkpoint(tmp_path, model, optimizer)
    other, again = build()
    load_checkpoint(tmp_path, other, again)
    assert [(group["lr"], group["weight_decay"]) for group in again.param_groups] == [(1e-2, 1e-2), (0.5, 0.0)]
    other, again = build(swapped=True)
    with pytest.raises(CheckpointError, match=r"parameter group 0 is another one .*: the checkpoint trains 0 rows of enter.bias"):
        load_checkpoint(tmp_path, other, again)


def test_no_checkpoint_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (IMMEDIATE,))
    model = _model(update="immediate")
    optimizer = _adamw(model)
    loss = compute_loss(model, vector_batch())
    with pytest.raises(TrainingError, match=r"between a training forward and its backward would lose the forward; call loss.backward\(\)"):
        save_checkpoint(tmp_path, model, optimizer)
    torch.autograd.backward(loss)
    with pytest.raises(TrainingError, match=r"has applied the gradients of the last backward .* optimizer.step\(\) was not called since"):
        save_checkpoint(tmp_path, model, optimizer)
    assert not list(tmp_path.iterdir())
    optimizer.step()
    assert save_checkpoint(tmp_path, model, optimizer) == tmp_path / "step-000001"


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    model = _model()
    foreign: Optimizer = AdamW([*model.parameters(), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"AdamW also trains a tensor of shape \(3,\) that is not the model's"):
        save_checkpoint(tmp_path, model, foreign)
    optimizer = _adamw(model)
    with pytest.raises(TypeError, match="extra cannot be kept: it holds more than tensors, numbers"):
        save_checkpoint(tmp_path, model, optimizer, extra=Path("x"))
    with pytest.raises(ValueError, match="keep is at least 1, not 0"):
        save_checkpoint(tmp_path, model, optimizer, keep=0)
    with pytest.raises(TypeError, match=r"that chunkft_compile.compile\(\) gave, not of a Mlp"):
        save_checkpoint(tmp_path, Mlp(), optimizer)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_last_written_is_the_latest_and_older_ones_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also after a return to an earlier step, whose successors have smaller numbers."""
    plan_by_hand(monkeypatch, (HELD,))
    model = _model()
    optimizer = _adamw(model)
    assert latest_checkpoint(tmp_path / "none") is None
    first = save_checkpoint(tmp_path, model, optimizer, keep=3)
    _train(model, optimizer, range(3))
    third = save_checkpoint(tmp_path, model, optimizer, keep=3)
    twice = save_checkpoint(tmp_path, model, optimizer, keep=3)
    assert [path.name for path in (first, third, twice)] == ["step-000000", "step-000003", "step-000003-2"]
    assert latest_checkpoint(tmp_path) == twice
    load_checkpoint(first, model, optimizer)
    assert not optimizer.state
    _train(model, optimizer, [0])
    back = save_checkpoint(tmp_path, model, optimizer)
    assert latest_checkpoint(tmp_path) == back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003-2"]


def test_neither_saving_nor_loading_holds_a_copy_of_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allocator: Allocator
) -> None:
    plan_by_hand(monkeypatch, (HELD, HELD))
    model = compile_quickly(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), 10**7)
    optimizer = _adamw(model)
    batch = torch.ones(2, 64)
    for _ in range(2):
        torch.autograd.backward(model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
    whole = sum(chunk.nbytes for chunk in model.chunks)
    largest = max(chunk.nbytes for chunk in model.chunks)
    allocator.reset()
    before = allocator.live()
    save_checkpoint(tmp_path, model, optimizer)
    assert allocator.peak() - before < largest < whole / 8 + 1
    allocator.reset()
    load_checkpoint(tmp_path, model, optimizer)
    assert allocator.peak() - before <= 5 * largest


def test_compile_is_exported() -> None:
    import chunkft_compile

    assert chunkft_compile.__all__ == sorted(chunkft_compile.__all__)
    assert all(hasattr(chunkft_compile, name) for name in chunkft_compile.__all__)
    assert compile is chunkft_compile.compile
