"""What `--json` and `--tensorboard` write of a run, and the bar; read back as their readers do."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from chunkft_compile.cli import events, main
from chunkft_compile.cli.config import TrainConfig
from chunkft_compile.cli.configuring import to_plain
from chunkft_compile.cli.events import Evaluated, Event, Planned, Saved, StepDone
from chunkft_compile.cli.listeners import Bar, JsonLines, Listeners
from chunkft_compile.cli.tensorboard import TensorBoard, check_tensorboard
from chunkft_compile.reports.runs import compare, read_run
from chunkft_compile.solving import read_plan

Capture = pytest.CaptureFixture[str]

KINDS = [one for one in vars(events).values() if isinstance(one, type) and issubclass(one, Event) and one is not Event]


def planned(step: int, steps: int) -> Planned:
    figures = {"budget_nbytes": 1000, "predicted_nbytes": 999, "plain_nbytes": 2000, "sweep_steps": 3, "sequences": 9, "held_out": 1}
    return Planned(step=step, steps=steps, config={}, **figures)


def done(step: int, loss: float) -> StepDone:
    figures: dict[str, Any] = {"lr": 0.1, "grad_norm": None, "tokens": 4, "seconds": 0.5, "measured_nbytes": 900, "process_nbytes": None}
    sweep = {"sweep": 0, "sweep_step": 0, "sweep_steps": 3, "active_chunks": 2, "predicted_nbytes": 999}
    return StepDone(step=step, steps=9, epoch=0.5, loss=loss, **figures, **sweep)


def test_every_kind_of_event_is_documented_by_its_name_and_fields() -> None:
    assert sorted(kind.event for kind in KINDS) == ["checkpoint", "eval", "plan", "saved", "step", "stopped"]
    for kind in KINDS:
        assert kind.__doc__


@pytest.mark.usefixtures("captures_once")
def test_json_lines_tell_a_whole_run(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    arguments = ["train", str(model_dir), "--data", str(text_file), "--out", str(out), "--budget", "400kB", "--device", "cpu", "--json"]
    arguments += [
        "--seq",
        "16",
        "--steps",
        "4",
        "--lr",
        "1e-2",
        "--eval-every",
        "2",
        "--checkpoint-every",
        "3",
        "--seconds",
        "1",
        "--measure",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    names = ["plan", "eval", "step", "step", "eval", "step", "checkpoint", "step", "eval", "saved"]
    assert [one["event"] for one in found] == names
    documented = {kind.event: {"event", *(field.name for field in dataclasses.fields(kind))} for kind in KINDS}
    assert all(one.keys() == documented[one["event"]] for one in found)
    plan, before, first, *_, last, saved = found
    fields: dict[str, Any] = {name: Path(value) if name in ("model", "data", "out") else value for name, value in plan["config"].items()}
    assert to_plain(TrainConfig(**fields)) == plan["config"]
    assert plan["predicted_nbytes"] <= plan["budget_nbytes"] == 400_000
    assert (plan["step"], plan["steps"], plan["sequences"] + plan["held_out"]) == (0, 4, 55)
    assert (before["step"], before["best_step"]) == (0, None)
    assert (first["step"], first["tokens"], first["sweep_steps"]) == (1, 16, plan["sweep_steps"])
    assert first["grad_norm"] > 0
    steps = [one for one in found if one["event"] == "step"]
    measured = steps[-1]["measured_nbytes"]  # without the evaluation between the measured steps
    assert steps[0]["measured_nbytes"] is None
    assert 0.98 * plan["predicted_nbytes"] < measured <= plan["predicted_nbytes"]
    assert last["perplexity"] < before["perplexity"]
    assert saved == {
        "event": "saved",
        "step": 4,
        "path": str(out),
        "perplexity_before": before["perplexity"],
        "perplexity_after": last["perplexity"],
    }
    assert "held-out perplexity before: " in said.err


def test_a_reader_that_leaves_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        lines = JsonLines()
        lines.hear(done(1, 1.0))
        assert json.loads(os.read(reader, 10_000))["step"] == 1
        os.close(reader)
        for step in (2, 3):
            lines.hear(done(step, 1.0))
    assert capsys.readouterr().err == "nobody reads the output of --json any more; the run goes on\n"


def test_tensorboard_reads_what_was_written_and_what_a_resumed_run_takes_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = TensorBoard(tmp_path / "runs"), TensorBoard(tmp_path / "runs")
    before: list[Event] = [planned(0, 9), done(1, 3.0), done(2, 2.0), Evaluated(step=2, loss=1.5, perplexity=4.5), done(3, 7.0)]
    for one in before:
        first.hear(one)
    first.close()
    accumulator = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(one.step, one.value) for one in accumulator.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 7.0)]
    after: list[Event] = [planned(2, 9), done(3, 1.0), Saved(step=3, path="x", perplexity_before=None, perplexity_after=None)]
    for one in after:
        second.hear(one)
    second.close()
    accumulator = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert sorted(accumulator.Tags()["scalars"]) == sorted(
        ["train/loss", "train/lr", "train/seconds", "memory/predicted_nbytes", "memory/measured_nbytes", "eval/loss", "eval/perplexity"]
    )
    assert [(one.step, one.value) for one in accumulator.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert [(one.step, one.value) for one in accumulator.Scalars("eval/perplexity")] == [(2, 4.5)]
    assert accumulator.Scalars("memory/measured_nbytes")[0].value == 900


@pytest.mark.usefixtures("fake_engine")
def test_the_command_writes_for_tensorboard(model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", str(model_dir), "--data", str(text_file), "--out", str(tmp_path / "out"), "--budget", "1GB", "--device", "cpu"]
    arguments += ["--seq", "16", "--steps", "3", "--tensorboard", str(tmp_path / "runs" / "one")]
    assert main(arguments) == 0
    accumulator = EventAccumulator(str(tmp_path / "runs" / "one")).Reload()
    assert [one.step for one in accumulator.Scalars("train/grad_norm")] == [1, 2, 3]
    assert [one.step for one in accumulator.Scalars("eval/loss")] == [0, 3]


def test_the_command_records_what_steps_take(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ["train", str(model_dir), "--data", str(text_file), "--budget", "1GB", "--out", str(tmp_path / "out")]
    arguments += ["--seq", "16", "--steps", "3", "--record", str(tmp_path / "run.jsonl"), "--plan-json", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    run = read_run(tmp_path / "run.jsonl")
    assert [step.loss is not None for step in run.steps] == [True] * 3
    assert compare(read_plan(tmp_path / "plan.json"), run).steps[0].sweeps >= 1
    assert main([*arguments, "--overwrite"]) == 1  # the first run is not lost
    assert read_run(tmp_path / "run.jsonl") == run


def test_without_tensorboard_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensorboard(tmp_path / "runs" / "one")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tensorboard: pip install 'chunkft_compile\[tensorboard\]'"):
        check_tensorboard(tmp_path)


def test_the_bar_shows_steps_and_writes_evaluations_beside_it(capsys: Capture) -> None:
    with Listeners([Bar(), JsonLines()]) as tell:
        for one in (
            planned(1, 3),
            done(2, 2.5),
            Evaluated(step=2, loss=1.5, perplexity=4.5, best_step=2, without_best=0),
            done(3, 2.0),
            Evaluated(step=3, loss=1.6, perplexity=5.0, best_step=2, without_best=1),
        ):
            tell(one)
    said = capsys.readouterr()
    assert "step 2: held-out perplexity 4.50, the best so far\n" in said.err
    assert "step 3: held-out perplexity 5.00, the best is that of step 2\n" in said.err
    assert "loss 2.000, step 1/3 of sweep 1, 2 active chunks, predicted 999 B of 1.0 kB, measured 900 B" in said.err
    assert len(said.out.splitlines()) == 5
