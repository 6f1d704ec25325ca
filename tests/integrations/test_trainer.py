"""The Trainer of transformers trains a compiled model as a plain loop does, keeps and resumes it, and logs what chunks took."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from transformers import Trainer

from chunkft_compile import CheckpointError, ChunkedModule
from chunkft_compile.integrations.transformers import ChunkedTrainer
from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.integrations.trainers import PLENTY, arguments, decayed, loop, rows, same_weights, train
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import RESIDENT, compile_quickly, smallest_nbytes
from tests.models import CASES, bert, class_batch, gpt2, llama, token_batch

pytestmark = pytest.mark.usefixtures("captures_once")

HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


def _compiled(make: Callable[[], nn.Module] = llama, **settings: Any) -> ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(make().train(), PLENTY, **settings)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_weights_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro: int) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 3, scattered=True)
    trained, expected = (_compiled(accumulation=micro > 1) for _ in range(2))
    train(trained, tmp_path, gradient_accumulation_steps=micro, weight_decay=0.1)
    loop(expected, micro=micro, weight_decay=0.1)
    same_weights(trained, expected)
    assert trained.progress == expected.progress
    assert trained.progress.sweep == 2


def test_a_sweep_of_one_step_is_the_plain_trainer(tmp_path: Path) -> None:
    trained = _compiled()
    trainer = train(trained, tmp_path, weight_decay=0.1)
    assert trained.progress.steps == 1
    torch.manual_seed(0)
    model = llama().train()
    plain = Trainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    plain.train()
    same_weights(trained, model, rtol=1e-5, atol=1e-7)
    mine, theirs = ([entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, plain))
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_immediate_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (IMMEDIATE, HELD))
    trained, expected = (_compiled(update="auto") for _ in range(2))
    trainer = train(trained, tmp_path, max_grad_norm=0.0)
    loop(expected, clip=0.0)
    same_weights(trained, expected)
    assert ["grad_norm" in entry for entry in trainer.state.log_history[:4]] == [False, True, False, True]


def test_mixed_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    trained, expected, exact = (_compiled() for _ in range(3))
    train(trained, tmp_path, bf16=True, max_steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        loop(expected, steps=3)
    loop(exact, steps=3)
    same_weights(trained, expected)
    assert not torch.equal(trained.state_dict()["lm_head.weight"], exact.state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("make", "planning"),
    [
        (partial(gpt2, dropout=0.1), {"scattered": True}),
        (partial(llama, tied=True), {"scattered": True}),
        (llama, {"away": True}),
    ],
    ids=["dropout", "tied", "streamed"],
)
def test_resuming_is_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Any, planning: dict[str, Any]) -> None:
    """In the middle of a sweep and of an epoch, by shuffled data."""
    plan_by_hand(monkeypatch, (HELD,) * 3, **planning)
    settings: dict[str, Any] = {"weights": ["device", "disk"]} if "away" in planning else {}
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": "random", "weight_decay": 0.1}
    whole, resumed = _compiled(make, **settings), _compiled(make, **settings)
    first = train(whole, tmp_path, **changes)
    again = train(resumed, tmp_path, resume=tmp_path / "checkpoint-4", **changes)
    same_weights(whole, resumed)
    assert whole.progress == resumed.progress
    assert whole.progress.step == 1
    assert again.state.global_step == 7
    mine, theirs = (one.optimizer.state_dict()["state"] for one in (first, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[number][key], theirs[number][key]) for number in mine for key in mine[number])
    logged = [[entry for entry in one.state.log_history if entry["step"] > 4 and "loss" in entry] for one in (first, again)]
    assert [entry["loss"] for entry in logged[0]] == [entry["loss"] for entry in logged[1]]


@pytest.mark.slow
def test_resuming_with_the_planner(workshop: Workshop, tmp_path: Path) -> None:
    budget = smallest_nbytes(workshop, CASES[0], resident=True) * 11 // 10
    whole, resumed = (compile_quickly(CASES[0].build(), budget, **RESIDENT) for _ in range(2))
    train(whole, tmp_path, max_steps=9, save_strategy="steps", save_steps=3)
    train(resumed, tmp_path, max_steps=9, save_strategy="steps", save_steps=3, resume=tmp_path / "checkpoint-3")
    assert whole.progress.steps > 1
    assert (whole.progress, whole.schedule) == (resumed.progress, resumed.schedule)
    same_weights(whole, resumed)


def test_resuming_under_another_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two sweeps: state is cut and joined by rows."""
    plan_by_hand(monkeypatch, (HELD,) * 2)
    torch.manual_seed(0)
    narrow = compile_quickly(llama().train(), 60_000)
    changes: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.0}
    train(narrow, tmp_path, **changes)
    wide = _compiled()
    assert len(wide.chunks) < len(narrow.chunks)
    trainer = train(wide, tmp_path, resume=tmp_path / "checkpoint-4", **changes)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {3}
    assert (wide.progress.sweep, narrow.progress.sweep) == (3, 3)


def test_a_checkpoint_is_a_model_to_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    model = _compiled(partial(llama, tied=True))
    trainer = train(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    assert trainer.accelerator.unwrap_model(trainer.model_wrapped) is model
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(kept) == {name for name, _ in model.module.named_parameters()}
    assert "lm_head.weight" not in kept
    trainer.save_model(str(tmp_path / "saved"))
    for folder in ("checkpoint-2", "saved"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        same_weights(loaded, model)
    assert {path.name for path in (tmp_path / "checkpoint-2" / "chunkft").iterdir()} == {"step-000002"}
    assert not list((tmp_path / "checkpoint-2" / "chunkft").rglob("weights-*"))


def test_weights_alone_start_anew_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    changes: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    train(_compiled(), tmp_path, **changes)
    assert not (tmp_path / "checkpoint-1" / "chunkft").exists()
    model = _compiled()
    with pytest.warns(UserWarning, match=r"holds weights only \(save_only_model\): optimizer state, learning rate and sweep start anew"):
        trainer = train(model, tmp_path, resume=tmp_path / "checkpoint-1", **changes)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {1}


def test_a_checkpoint_of_the_plain_trainer_is_refused(tmp_path: Path) -> None:
    plain = Trainer(model=llama().train(), args=arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=rows())
    plain.train()
    with pytest.raises(CheckpointError, match=r"has an optimizer.pt and no chunkft/: .* start from its weights \(from_pretrained\)"):
        train(_compiled(), tmp_path, resume=tmp_path / "checkpoint-1")


def test_the_best_model_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2, away=True)
    model = _compiled(weights=["device", "disk"])
    changes: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    args = arguments(tmp_path, **changes, save_steps=1, load_best_model_at_end=True)
    trainer = ChunkedTrainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(6))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert best < 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == min(losses)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    same_weights(model, loaded)


def test_the_log_has_the_sweep_and_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    plan_by_hand(monkeypatch, (HELD,) * 3)
    model = _compiled()
    trainer = train(model, tmp_path, max_steps=6, logging_steps=2, report_to=["tensorboard"])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["chunkft/sweep"] for entry in logged] == pytest.approx([2 / 3, 4 / 3, 2])
    schedule = model.schedule
    assert schedule is not None
    for entry, second in zip(logged, (1, 0, 2), strict=True):
        assert entry["chunkft/steps_per_sweep"] == 3
        assert entry["chunkft/active_chunks"] == len(schedule.steps[second].chunks)
        assert entry["chunkft/predicted_nbytes"] == max(schedule.steps[second].peak_nbytes, schedule.steps[second - 1].peak_nbytes)
        assert entry["chunkft/budget_nbytes"] == PLENTY
        if model._session.guard.gauge is not None:
            assert 0 < entry["chunkft/measured_nbytes"] <= entry["chunkft/predicted_nbytes"]
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = events.Scalars("train/chunkft/predicted_nbytes")
    assert [(event.step, event.value) for event in written] == [(entry["step"], entry["chunkft/predicted_nbytes"]) for entry in logged]


def test_decay_reaches_the_chunks_that_the_trainer_would_decay(tmp_path: Path) -> None:
    model = _compiled(gpt2)
    trainer = ChunkedTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    plain = Trainer(model=model.module, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    names = {chunk.name: chunk.param for chunk in model.chunks}
    whole = set(plain.get_decay_parameter_names(model.module))
    chosen = trainer.get_decay_parameter_names(model)
    assert {names[name] for name in chosen} == whole & set(names.values())
    assert not any("ln_1" in name for name in chosen)  # a LayerNorm by its class, which its name does not tell
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(chosen), len(names) - len(chosen)]


def test_the_plain_trainer_warns_that_nothing_decays(tmp_path: Path) -> None:
    trainer = Trainer(model=_compiled(), args=arguments(tmp_path, weight_decay=0.1, max_steps=1), train_dataset=rows())
    with pytest.warns(UserWarning, match=r"the group of AdamW with weight_decay=0.1 is empty, so nothing is decayed"):
        trainer.train()


def test_the_plain_trainer_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 3)
    trained, expected = _compiled(), _compiled()
    Trainer(model=trained, args=arguments(tmp_path), train_dataset=rows()).train()
    loop(expected)
    same_weights(trained, expected)


def test_a_run_shorter_than_a_sweep_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 4)
    model = _compiled()
    match = (
        r"training ends after 3 of the 4 steps that one sweep takes: \d+% of the trainable elements will never be trained, in \d "
        r"parameters \(model.layers.1.mlp.up_proj.weight, .* and \d more\)\. Train for a multiple of 4 steps"
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.warns(UserWarning, match=match):
        train(model, tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    untouched = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
    assert untouched
    assert "lm_head.weight" in untouched
    train(_compiled(), tmp_path, max_steps=4, resume=tmp_path / "checkpoint-2")  # this sweep ends: no warning


def _by_label(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss computed outside of the model."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / int(num_items_in_batch)


def test_a_loss_computed_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    inside, outside = _compiled(), _compiled()
    train(inside, tmp_path, max_steps=3)
    args = arguments(tmp_path, max_steps=3)
    ChunkedTrainer(model=outside, args=args, train_dataset=rows(), compute_loss_func=_by_label).train()
    same_weights(outside, inside, rtol=1e-4, atol=1e-6)


def test_label_smoothing_shifts_labels_of_causal_models(tmp_path: Path) -> None:
    """It asks for the name of the model's class; one that it does not know would be scored on its own inputs."""
    trained = _compiled()
    args = arguments(tmp_path, max_steps=3, label_smoothing_factor=0.1)
    ChunkedTrainer(model=trained, args=args, train_dataset=rows()).train()
    torch.manual_seed(0)
    plain = llama().train()
    Trainer(model=plain, args=args, train_dataset=rows()).train()
    same_weights(trained, plain, rtol=1e-4, atol=1e-6)


def _right(prediction: Any) -> dict[str, float]:
    return {"right": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def test_evaluation_and_prediction_are_the_models(tmp_path: Path) -> None:
    model = _compiled(bert)
    data: Any = [{name: value[0] for name, value in class_batch(seed, rows=1).items()} for seed in range(6)]
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    both = ((ChunkedTrainer, model), (Trainer, model.module))
    mine, plain = (kind(model=one, args=args, eval_dataset=data, compute_metrics=_right) for kind, one in both)
    assert mine.label_names == plain.label_names == ["labels"]
    found, expected = mine.predict(data), plain.predict(data)
    assert np.array_equal(np.asarray(found.predictions), np.asarray(expected.predictions))
    assert found.metrics is not None
    assert expected.metrics is not None
    for key in ("test_loss", "test_right"):
        assert found.metrics[key] == expected.metrics[key]
    assert model.schedule is None


@pytest.mark.slow
def test_lengths_by_group_with_padding_and_columns_of_no_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    plan_by_hand(monkeypatch, (HELD,) * 2)
    model = _compiled()
    lengths = [4, 9, 6, 10, 5, 7, 8, 4, 10, 6, 9, 5]
    sequences = [token_batch(seed, rows=1, tokens=length)["input_ids"][0].tolist() for seed, length in enumerate(lengths)]
    data = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids, "note": "not for the model"} for ids in sequences])

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(set(item) == {"input_ids", "labels"} for item in items)
        most = max(len(item["input_ids"]) for item in items)
        padded = {"input_ids": 0, "labels": -100}
        return {name: torch.tensor([item[name] + [by] * (most - len(item[name])) for item in items]) for name, by in padded.items()}

    args = arguments(tmp_path, max_steps=6, train_sampling_strategy="group_by_length", per_device_train_batch_size=3)
    model.plan(**token_batch(rows=3), num_items_in_batch=torch.tensor(9) / 1)
    trainer = ChunkedTrainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert (model.counts.captures, model.counts.plans) == (1, 1)


def test_models_made_by_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    trainer = ChunkedTrainer(model_init=lambda: _compiled(), args=arguments(tmp_path, max_steps=2), train_dataset=rows())
    trainer.train()
    expected = _compiled()
    loop(expected, steps=2)
    assert trainer.model is not None
    same_weights(trainer.model, expected)


def test_optimizers_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (HELD,) * 2)
    trained, expected = _compiled(), _compiled()
    optimizer = AdamW(decayed(trained, 0.1), lr=1e-2, fused=True)
    args = arguments(tmp_path)
    ChunkedTrainer(model=trained, args=args, train_dataset=rows(), optimizers=(optimizer, None)).train()
    del optimizer
    loop(expected, weight_decay=0.1)
    same_weights(trained, expected)
