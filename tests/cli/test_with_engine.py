"""Both commands with the real engine on a tiny model: a refused budget names one that works, and that one trains."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from chunkft_compile.cli import main
from chunkft_compile.planner import Placement, Plan, from_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("captures_once")]

SHAPE = ["--batch", "2", "--seq", "16", "--device", "cpu", "--seconds", "1"]


def smallest_budget(model_dir: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Start a little above the weights (107 kB) and follow the advice of each refusal."""
    budget = "110kB"
    for _ in range(4):  # a larger budget has larger chunks, so the first advice may be short
        if main(["plan", str(model_dir), "--budget", budget, *SHAPE, *more]) == 0:
            return budget
        match = re.search(r"the smallest that does: --budget ([0-9]+B)\)$", capsys.readouterr().err.strip())
        assert match is not None
        budget = match[1]
    raise AssertionError(f"{budget}, the fourth advice in a row, is refused too")


def test_plan_then_train_in_the_smallest_budget(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = smallest_budget(model_dir, capsys)
    plan = tmp_path / "plan.json"
    assert main(["plan", str(model_dir), "--budget", budget, "--json", str(plan), *SHAPE]) == 0
    schedule = from_json(plan.read_text(), Plan).schedule
    assert schedule.peak_nbytes <= schedule.budget_nbytes == int(budget.removesuffix("B"))
    assert "plain AdamW needs " in capsys.readouterr().out

    out = tmp_path / "out"
    steps = str(len(schedule.steps))
    files = ["--data", str(text_file), "--out", str(out)]
    assert main(["train", str(model_dir), "--budget", budget, *SHAPE, *files, "--steps", steps, "--lr", "1e-2", "--measure"]) == 0
    said = capsys.readouterr().err
    before, after = (float(said.split(f"held-out perplexity {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before
    assert f"step {steps}/{steps} of sweep 1" in said
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, out))
    unmoved = [name for name in old if torch.equal(old[name], new[name])]
    assert unmoved == []  # one sweep trains every parameter


def test_a_planned_precision_is_trained_in(model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the smallest budget for bf16 weights with masters."""
    how = ["--dtype", "bf16", "--precision", "master"]
    budget = smallest_budget(model_dir, capsys, *how)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert main(["plan", str(model_dir), "--budget", budget, "--json", str(plan), *SHAPE, *how]) == 0
    steps = 3 * len(from_json(plan.read_text(), Plan).schedule.steps)
    files = ["--data", str(text_file), "--out", str(out), "--steps", str(steps), "--lr", "1e-2", "--measure"]
    capsys.readouterr()
    assert main(["train", str(model_dir), "--schedule", str(plan), "--dtype", "bf16", *SHAPE, *files]) == 0
    said = capsys.readouterr().err
    before, after = (float(said.split(f"held-out perplexity {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before
    assert {value.dtype for value in AutoModelForCausalLM.from_pretrained(out).state_dict().values()} == {torch.bfloat16}


def test_weights_that_are_away_are_not_measured_as_there(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    budget = smallest_budget(model_dir, capsys)
    files = ["--data", str(text_file), "--out", str(tmp_path / "out"), "--plan-json", str(plan), "--steps", "60", "--measure", "--json"]
    capsys.readouterr()
    assert main(["train", str(model_dir), "--budget", budget, *SHAPE, *files]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [one for one in found if one["event"] == "step"]
    assert Placement.DISK in from_json(plan.read_text(), Plan).schedule.places.weights
    predicted = max(one["predicted_nbytes"] for one in steps)
    loop_nbytes = 1000  # what the command's own loop holds, such as a batch and the last loss, is in no plan
    assert 0.95 * predicted < steps[-1]["measured_nbytes"] <= predicted + loop_nbytes
