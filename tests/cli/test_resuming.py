"""`chunkft train --checkpoint-every`, stopped, and `--resume`: the same model, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chunkft_compile.cli import loop, main
from chunkft_compile.planner import Plan, from_json

pytestmark = pytest.mark.usefixtures("captures_once")
Capture = pytest.CaptureFixture[str]

SHAPE = ["--batch", "2", "--seq", "16", "--device", "cpu"]
STEPS = 5


@pytest.fixture
def plan(model_dir: Path, tmp_path: Path) -> Path:
    """Of more than one step a sweep."""
    path = tmp_path / "plan.json"
    assert main(["plan", str(model_dir), "--budget", "200kB", "--seconds", "1", "--json", str(path), *SHAPE]) == 0
    assert len(from_json(path.read_text(), Plan).schedule.steps) > 1
    return path


def _train(model_dir: Path, plan: Path, out: Path, *more: str) -> int:
    files = ["--data", str(plan.parent / "text.txt"), "--out", str(out), "--schedule", str(plan), "--eval-fraction", "0"]
    return main(["train", str(model_dir), *files, *SHAPE, "--steps", str(STEPS), "--lr", "1e-2", "--checkpoint-every", "2", *more])


def _interrupt(patch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in the backward that follows `after` others."""
    backward, done = loop._backward, iter(range(100))

    def interrupted(*arguments: Any) -> float:
        if next(done) == after:
            raise KeyboardInterrupt
        return backward(*arguments)

    patch.setattr(loop, "_backward", interrupted)


def test_a_stopped_run_goes_on_to_the_same_model(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _train(model_dir, plan, tmp_path / "whole") == 0
    out = tmp_path / "out"
    assert _train(model_dir, plan, out, "--resume") == 1
    assert "--resume finds no checkpoint in" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        _interrupt(patch, 3)
        assert _train(model_dir, plan, out) == 130
    assert not out.exists()
    assert [path.name for path in (tmp_path / "out.checkpoints").iterdir()] == ["step-000002"]
    torch.manual_seed(7)
    assert _train(model_dir, plan, out, "--resume", "--lr", "2e-2") == 1
    assert "this is another one: --lr was 0.01, is 0.02" in capsys.readouterr().err
    assert _train(model_dir, plan, out, "--resume") == 0
    one, two = (load_file(directory / "model.safetensors") for directory in (tmp_path / "whole", out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "out.checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_a_run_that_was_only_not_saved(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.cli.fine_tune.save_model", interrupt)
        assert _train(model_dir, plan, tmp_path / "out", "--steps", "2") == 130
    assert _train(model_dir, plan, tmp_path / "out", "--steps", "2", "--resume") == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
