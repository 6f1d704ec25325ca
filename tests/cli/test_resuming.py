"""`chunkft train` that is stopped, by signals and by patience, and `--resume`: the same model and the same history, bit by bit."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chunkft_compile.checkpoints import latest_checkpoint
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


def _arguments(model_dir: Path, plan: Path, out: Path, *more: str) -> list[str]:
    files = ["--data", str(plan.parent / "text.txt"), "--out", str(out), "--schedule", str(plan), "--eval-fraction", "0"]
    return ["train", str(model_dir), *files, *SHAPE, "--steps", str(STEPS), "--lr", "1e-2", "--checkpoint-every", "2", *more]


def _train(model_dir: Path, plan: Path, out: Path, *more: str) -> int:
    return main(_arguments(model_dir, plan, out, *more))


def _in_backward(patch: pytest.MonkeyPatch, after: int, what: Callable[[], None]) -> None:
    """Do something in the backward that follows `after` others."""
    backward, done = loop._backward, iter(range(100))

    def disturbed(*arguments: Any) -> tuple[float, int]:
        if next(done) == after:
            what()
        return backward(*arguments)

    patch.setattr(loop, "_backward", disturbed)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _signalling_batches(batches: Iterable[int], **_: Any) -> Iterator[int]:
    """Ctrl-C before the second batch of an evaluation."""
    for number, batch in enumerate(batches):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        yield batch


def _same(one: Path, other: Path) -> bool:
    first, second = (load_file(directory / "model.safetensors") for directory in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _history(out: Path) -> Any:
    latest = latest_checkpoint(out.with_name(f"{out.name}.checkpoints"))
    assert latest is not None
    return torch.load(latest / "training.pt", weights_only=True)["extra"]["history"]


def test_a_killed_run_goes_on_to_the_same_model(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _train(model_dir, plan, tmp_path / "whole") == 0
    out = tmp_path / "out"
    assert _train(model_dir, plan, out, "--resume") == 1
    assert "--resume finds no checkpoint in" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        _in_backward(patch, 3, _interrupt)
        assert _train(model_dir, plan, out) == 130
    assert "interrupted; no model was saved; the checkpoint of step 2 is complete, go on with: chunkft train " in capsys.readouterr().err
    assert not out.exists()
    assert [path.name for path in (tmp_path / "out.checkpoints").iterdir()] == ["step-000002"]
    torch.manual_seed(7)
    assert _train(model_dir, plan, out, "--resume", "--lr", "2e-2") == 1
    assert "this is another one: --lr was 0.01, is 0.02" in capsys.readouterr().err
    assert _train(model_dir, plan, out, "--resume") == 0
    assert _same(tmp_path / "whole", out)
    assert sorted(path.name for path in (tmp_path / "out.checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_a_run_that_was_only_not_saved(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.cli.fine_tune.save_model", lambda *_: _interrupt())
        assert _train(model_dir, plan, tmp_path / "out", "--steps", "2") == 130
    assert _train(model_dir, plan, tmp_path / "out", "--steps", "2", "--resume") == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_under_way(
    signum: signal.Signals,
    code: int,
    model_dir: Path,
    text_file: Path,
    plan: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any checkpoint asked for; the command that it prints is the one that goes on."""
    assert _train(model_dir, plan, tmp_path / "whole", "--checkpoint-every", "0") == 0
    out, handlers = tmp_path / "out", [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        _in_backward(patch, 2, lambda: signal.raise_signal(signum))
        assert _train(model_dir, plan, out, "--checkpoint-every", "0", "--json") == code
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr()
    kept = tmp_path / "out.checkpoints" / "step-000003"
    line = said.err.splitlines()[-1]
    assert line.startswith(f"chunkft: stopped after step 3, everything is kept in {kept}; go on with: chunkft train ")
    assert not out.exists()
    *_, last = [json.loads(line) for line in said.out.splitlines()]
    command = line.partition("go on with: chunkft ")[2]
    assert last == {"event": "stopped", "reason": signum.name, "step": 3, "checkpoint": str(kept), "command": f"chunkft {command}"}
    assert main(command.split()) == 0
    assert _same(tmp_path / "whole", out)


def test_a_second_signal_ends_the_run_at_once(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    assert _train(model_dir, plan, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        _in_backward(patch, 3, twice)
        assert _train(model_dir, plan, tmp_path / "out") == 130
    assert "chunkft: interrupted; no model was saved; the checkpoint of step 2 is complete" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out.checkpoints").iterdir()) == ["step-000002"]
    assert _train(model_dir, plan, tmp_path / "out", "--resume") == 0
    assert _same(tmp_path / "whole", tmp_path / "out")


def test_a_signal_while_a_checkpoint_is_written(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one waits for it, and the second one leaves the older one as it is."""
    fsync, calls = os.fsync, iter(range(1000))
    with monkeypatch.context() as patch:

        def signalling(descriptor: int) -> None:
            if next(calls) in (20, 21):
                signal.raise_signal(signal.SIGINT)
            fsync(descriptor)

        patch.setattr(os, "fsync", signalling)
        assert _train(model_dir, plan, tmp_path / "out", "--checkpoint-every", "1", "--keep", "9") == 130
    names = [path.name for path in (tmp_path / "out.checkpoints").iterdir()]
    assert names
    assert all(name.startswith("step-") for name in names)  # what was half written has a hidden name
    assert _train(model_dir, plan, tmp_path / "out", "--checkpoint-every", "1", "--keep", "9", "--resume") == 0


def test_scores_best_and_patience_are_those_of_a_run_that_was_not_stopped(
    model_dir: Path, text_file: Path, plan: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that first helps and then does harm, stopped in a step and in an evaluation."""
    more = ["--eval-fraction", "0.3", "--eval-every", "1", "--patience", "2", "--keep-best", "--steps", "12", "--lr", "0.3"]
    more += ["--lr-schedule", "constant", "--checkpoint-every", "1", "--warmup", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _train(model_dir, plan, whole, *more) == 0
    history = _history(whole)
    assert "2 evaluations in a row were no better than the best" in capsys.readouterr().err
    assert len(history["losses"]) < 12
    best = min(history["scores"], key=lambda score: score[1])
    assert best[0] == len(history["losses"]) - 2
    with monkeypatch.context() as patch:
        _in_backward(patch, best[0], lambda: signal.raise_signal(signal.SIGINT))  # the step after the best
        assert _train(model_dir, plan, out, *more) == 130
    assert [score[0] for score in _history(out)["scores"]] == list(range(1, best[0] + 1))  # the last step is not scored yet
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.cli.evaluating.tqdm", _signalling_batches)
        assert _train(model_dir, plan, out, *more, "--resume") == 130
    assert [score[0] for score in _history(out)["scores"]] == list(range(1, best[0] + 1))
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.cli.fine_tune.replace_directory", lambda *_: _interrupt())  # in the last moment
        assert _train(model_dir, plan, out, *more, "--resume") == 130
    assert _history(out) == history
    assert _train(model_dir, plan, out, *more, "--resume") == 0
    assert _history(out) == history
    assert _same(whole, out)
    assert _same(out, tmp_path / "out.checkpoints" / "best")


def test_other_threads_train_without_handlers(model_dir: Path, text_file: Path, plan: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(_train(model_dir, plan, tmp_path / "out", "--steps", "1")))
    thread.start()
    thread.join()
    assert codes == [0]
