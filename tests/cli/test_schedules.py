"""`plan --json` and `train --schedule`, updates inside backward, and forced ingredients, with the real engine on a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from chunkft_compile.cli import main
from chunkft_compile.planner import Placement, Plan, Update, from_json

Capture = pytest.CaptureFixture[str]

SHAPE = ["--seq", "16", "--device", "cpu"]
BUDGET = ["--budget", "400kB"]


def error_line(capsys: Capture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkft: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def training(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    files = ["--data", str(text), "--out", str(out), "--eval-fraction", "0", "--steps", "2"]
    return ["train", str(model), *SHAPE, *files, *more]


@pytest.fixture(scope="module")
def plan_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with forced ingredients and updates inside backward."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    forced = ["--update", "immediate", "--state", "disk", "--options", "inputs", "--prefer", "fresh", "--max-steps", "3"]
    assert main(["plan", str(model_dir), *SHAPE, *BUDGET, *forced, "--seconds", "1", "--json", str(file)]) == 0
    return file


def test_a_kept_plan_has_what_was_asked_for(plan_file: Path) -> None:
    kept = from_json(plan_file.read_text(), Plan)
    assert kept.lowered
    assert kept.schedule.budget_nbytes == 400_000
    assert len(kept.schedule.steps) <= 3
    assert {step.update for step in kept.schedule.steps} == {Update.IMMEDIATE}
    assert {*kept.schedule.places.state} == {Placement.DISK}
    assert list(plan_file.parent.iterdir()) == [plan_file]


def test_train_runs_a_kept_plan(plan_file: Path, model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    kept = from_json(plan_file.read_text(), Plan)
    steps = str(len(kept.schedule.steps))
    assert main(training(model_dir, text_file, out, "--schedule", str(plan_file), "--clip", "0", "--steps", steps, "--lr", "1e-2")) == 0
    assert f"plan: {steps} step" in capsys.readouterr().err
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, out))
    assert [name for name in old if torch.equal(old[name], new[name])] == []  # one sweep trains every parameter


def test_train_refuses_a_plan_for_something_else(
    plan_file: Path, model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = training(model_dir, text_file, tmp_path / "out", "--schedule", str(plan_file), "--clip", "0", "--seq", "24")
    assert main(arguments) == 1
    line = error_line(capsys)
    assert "this plan was made for something else" in line
    assert "inputs: the plan has" in line


@pytest.mark.slow
def test_a_plan_for_another_optimizer(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    plan = tmp_path / "plan.json"
    assert main(["plan", str(model_dir), *SHAPE, *BUDGET, "--optimizer", "sgd-momentum", "--seconds", "1", "--json", str(plan)]) == 0
    arguments = training(model_dir, text_file, tmp_path / "out", "--schedule", str(plan))
    assert main(arguments) == 1
    assert "optimizer: the plan has " in error_line(capsys)
    assert main([*arguments, "--optimizer", "sgd-momentum", "--lr", "0.1", "--lr-schedule", "constant"]) == 0
    assert "plan: plain sgd-momentum needs " in capsys.readouterr().err


def test_refusals_before_the_model_is_loaded(
    plan_file: Path, model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("chunkft_compile.cli.planned.load_weights", load)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    plan = ["--schedule", str(plan_file)]
    for more, message in [
        (plan, f"--schedule {plan_file} has IMMEDIATE updates, which apply each gradient inside backward, before the norm"),
        ([*plan, "--clip", "0", "--accumulate", "2"], "--accumulate 2 adds them up over batches"),
        ([*plan, "--budget", "1GB"], f"--budget 1GB is not that of --schedule {plan_file}, 400000B: leave --budget out"),
        ([*plan, "--update", "held"], "was planned already: leave --update out"),
        ([*plan, "--max-steps", "1"], "was planned already: leave --max-steps out"),
        (["--schedule", str(broken)], f"{broken} is not a plan"),
        (["--schedule", str(tmp_path / "none.json")], "none.json cannot be read"),
        ([], '--budget is needed: memory on cpu, as "14GB"; or a --schedule that has one'),
        ([*BUDGET, "--update", "auto"], "--clip 1 needs it: pass --clip 0, or --update held"),
        ([*BUDGET, "--update", "immediate", "--clip", "0", "--accumulate", "4"], "--accumulate 4 adds them up over batches"),
    ]:
        assert main(training(model_dir, text_file, tmp_path / "out", *more)) == 1, message
        assert message in error_line(capsys)


@pytest.mark.slow
def test_train_plans_with_updates_inside_backward(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    more = ["--update", "auto", "--clip", "0", "--prefer", "fresh", "--max-steps", "4", "--seconds", "1"]
    assert main(training(model_dir, text_file, tmp_path / "out", *BUDGET, *more)) == 0
    assert "plan: 1 step a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_forced_ingredients_that_are_not_there(model_dir: Path, capsys: Capture) -> None:
    for forced, message in [
        (["--options", "magic"], "no segment has an option 'magic'; there are "),
        (["--state", "host"], "place of optimizer state host is not allowed here; allowed: device, disk"),
    ]:
        assert main(["plan", str(model_dir), *SHAPE, *BUDGET, *forced]) == 1
        assert message in error_line(capsys)
