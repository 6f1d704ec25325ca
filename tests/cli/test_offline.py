"""`plan` for a device that is not here, `fit` and `pareto`: answers, exit codes, and one-line refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from chunkft_compile.budget import budgets_between
from chunkft_compile.cli import main
from chunkft_compile.cli.fit import largest
from chunkft_compile.offline import Choices, OfflineModel, Shape, read_config, smallest_offline
from chunkft_compile.planner import Placement, Plan, from_json
from chunkft_compile.planner.devices import find_device

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """Commands about the same model and shape share its capture, which costs more than the planning."""
    models: dict[str, OfflineModel] = {}

    def captured(config: Any, *settings: Any, **more: Any) -> OfflineModel:
        key = repr((config.to_json_string(), settings, more))
        if key not in models:
            models[key] = OfflineModel(config, *settings, **more)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chunkft_compile.cli.offline.OfflineModel", captured)
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, no weights beside it."""
    directory = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(directory)
    return directory / "config.json"


def error_line(capsys: Capture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkft: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_plan_for_a_card_says_that_it_is_modelled(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", str(config_file), "--device", "rtx4090", "--seq", "16", "--dtype", "bf16", "--json", str(file), "--seconds", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "modelled, not measured: times and temporaries of NVIDIA GeForce RTX 4090" in said.out
    assert "the memory of rtx4090, less" in said.err
    kept = from_json(file.read_text(), Plan)
    assert kept.schedule.peak_nbytes <= kept.schedule.budget_nbytes == kept.problem.budget_nbytes < 24 * 10**9
    assert (kept.lowered, kept.fingerprint.device, kept.fingerprint.optimizer) == (False, "rtx4090", "adamw")
    assert list(tmp_path.iterdir()) == [file]
    files = ["--data", "none.txt", "--out", str(tmp_path / "out")]
    assert main(["train", str(config_file.parent), "--device", "cpu", *files, "--schedule", str(file)]) == 1
    assert f"--schedule {file} was planned for rtx4090, a device that was not here: plan on the device" in error_line(capsys)


def test_a_precision_reaches_the_plan(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", str(config_file), "--device", "rtx4090", "--seq", "16", "--json", str(file), "--seconds", "1"]
    assert main([*arguments, "--dtype", "bf16", "--precision", "master"]) == 0
    assert "bfloat16 (precision master), adamw" in capsys.readouterr().err
    kept = from_json(file.read_text(), Plan)
    assert kept.fingerprint.precision == "master"
    largest_chunk = max(kept.problem.chunks, key=lambda chunk: chunk.grad_nbytes)
    rounded = -(-2 * largest_chunk.weight_nbytes // 512) * 512
    assert largest_chunk.state_nbytes == 3 * rounded  # fp32 tensors, for weights in bf16
    assert main([*arguments, "--precision", "stochastic"]) == 1
    assert 'precision="stochastic" is for bfloat16 or float16 weights, these are float32' in error_line(capsys)
    files = ["--data", "none.txt", "--out", str(tmp_path / "out"), "--budget", "1GB"]
    assert main(["train", str(config_file.parent), "--device", "cpu", *files, "--precision", "master"]) == 1
    assert 'precision="master" is for bfloat16' in error_line(capsys)


def test_forced_ingredients_reach_the_plan(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", str(config_file), "--device", "rtx4090", "--seq", "16", "--budget", "700kB", "--seconds", "1", "--json", str(file)]
    forced = ["--options", "inputs", "--state", "host,disk", "--update", "auto", "--max-steps", "1", "--overlap"]
    assert main([*arguments, *forced]) == 0
    said = capsys.readouterr()
    kept = from_json(file.read_text(), Plan)
    assert len(kept.schedule.steps) == 1
    assert {*kept.schedule.steps[0].options[1:-1]} == {"inputs"}  # all blocks
    assert {*kept.schedule.places.state} == {Placement.HOST}
    assert [link.overlaps for link in kept.problem.links] == [True, False]
    assert "copies beside compute are what the link allows: nobody has measured them on this device" in said.out
    assert ", with copies beside compute" in said.err


def test_a_method_is_planned_as_it_is(config_file: Path, capsys: Capture) -> None:
    arguments = ["plan", str(config_file), "--device", "rtx4090", "--seq", "16", "--method"]
    assert main([*arguments, "hift"]) == 0
    out = capsys.readouterr().out
    assert "T = 6, " in out
    assert "the method hift; its gap" in out
    assert main([*arguments, "in-backward"]) == 0  # updates are what the method needs unless chosen
    assert "immediate" in capsys.readouterr().out


def test_a_method_that_does_not_fit_says_what_it_needs(config_file: Path, capsys: Capture) -> None:
    arguments = ["plan", str(config_file), "--device", "rtx4090", "--seq", "16", "--method"]
    assert main([*arguments, "plain", "--budget", "600kB"]) == 2
    line = error_line(capsys)
    assert "the method plain does not fit 600.0 kB (600000 bytes) (bound by the steps of plain; the smallest that does: --budget" in line
    smallest = line.rsplit(" ", 1)[1].rstrip(")")
    assert main([*arguments, "plain", "--budget", smallest]) == 0


def test_too_few_steps_is_no_question_of_the_smallest_budget(config_file: Path, capsys: Capture) -> None:
    arguments = [
        "plan",
        str(config_file),
        "--device",
        "rtx4090",
        "--seq",
        "16",
        "--budget",
        "360kB",
        "--seconds",
        "1",
        "--state",
        "device,host",
    ]
    assert main([*arguments, "--max-steps", "1"]) == 2
    line = error_line(capsys)
    assert "no schedule of at most 1 steps fits 360.0 kB" in line
    assert "the smallest that does" not in line


@pytest.mark.slow
def test_plan_refuses_a_small_budget_with_one_that_does(config_file: Path, capsys: Capture) -> None:
    arguments = ["plan", str(config_file), "--device", "h100", "--seq", "16", "--seconds", "1", "--optimizer", "sgd-momentum"]
    assert main([*arguments, "--budget", "200kB"]) == 2
    line = error_line(capsys)
    smallest = line.rsplit(" ", 1)[1].rstrip(")")
    assert "the smallest that does: --budget" in line
    assert main([*arguments, "--budget", smallest]) == 0


@pytest.mark.slow
def test_fit_finds_the_largest_batch_and_sequence(config_file: Path, capsys: Capture) -> None:
    arguments = ["fit", str(config_file.parent), "--device", "rtx3090", "--seq", "16", "--budget"]
    assert main([*arguments, "700kB"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    batch = int(said["largest batch of 16 tokens"])
    seq = int(said["longest sequence in batches of 1"].split()[0])
    assert batch >= 1
    assert 16 <= seq <= 64
    model = OfflineModel(read_config(str(config_file)), Shape(batch + 1, 16), torch.float32, find_device("rtx3090"))
    assert smallest_offline(model, "adamw", Choices())[0] > 700_000


@pytest.mark.slow
def test_fit_says_no_with_exit_code_2(config_file: Path, capsys: Capture) -> None:
    assert main(["fit", str(config_file), "--device", "cpu", "--seq", "16", "--budget", "100kB"]) == 2
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "largest batch of 16 tokens: none" in out
    assert "modelled, not measured" in out


@pytest.mark.slow
def test_pareto_goes_from_the_smallest_budget_to_room_for_everything(config_file: Path, capsys: Capture) -> None:
    assert main(["pareto", str(config_file), "--device", "a100-80", "--seq", "16", "--points", "3", "--seconds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:5]]
    steps = [int(row[2]) for row in rows]
    assert steps[0] > 1
    assert steps[-1] == 1
    assert steps == sorted(steps, reverse=True)
    assert "modelled, not measured" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "llama-3-8b", "--budget", "24GB"], "llama-3-8b is a preset, which has no weights to plan with on this machine"),
        (["plan", "llama-3-8b", "--budget", "24GB", "--device", "cuda"], "name a device to model (--device rtx4090"),
        (["plan", "llama-9", "--device", "rtx4090"], "'llama-9' is neither a preset nor a file; presets: llama-2-7b"),
        (["plan", "gpt2", "--device", "rtx4090", "--budget", "lots"], "--budget 'lots' is not an amount of memory: write \"14GB\""),
        (["plan", "gpt2", "--device", "rtx4090", "--budget", "25GiB"], "--budget 25GiB is more than the 25.340 GB of rtx4090"),
        (["plan", "gpt2", "--device", "rtx4090", "--seq", "2000"], "2000 tokens are longer than the 1024 positions of gpt2"),
        (["plan", "gpt2", "--device", "rtx4090", "--update", "auto", "--accumulate", "2"], "--accumulate 2 needs --update held"),
        (["plan", "CONFIG", "--device", "cpu", "--seq", "16", "--weights", "host"], "cpu has no host beside it for weights: device, disk"),
        (["plan", "gpt2", "--device", "h100", "--host-memory", "50%"], "--host-memory '50%' is not an amount of memory"),
        (["plan", "model", "--budget", "1GB", "--update", "auto", "--device", "cpu"], "model model does not exist"),
        (
            ["plan", "CONFIG", "--device", "h100", "--seq", "16", "--options", "magic"],
            "no segment has an option 'magic'; there are cheap, inputs",
        ),
        (
            ["plan", "CONFIG", "--device", "cpu", "--seq", "16", "--state", "host"],
            "optimizer state host is not allowed here; allowed: device, disk",
        ),
        (
            ["plan", "CONFIG", "--device", "h100", "--seq", "16", "--state", "host", "--host-memory", "1kB"],
            "may go to the host and no further, which holds 1000 bytes and has",
        ),
        (
            ["plan", "CONFIG", "--device", "h100", "--seq", "16", "--method", "hift", "--max-steps", "3"],
            "--method hift and --max-steps contradict each other",
        ),
        (
            ["plan", "CONFIG", "--device", "h100", "--seq", "16", "--method", "in-backward", "--accumulate", "2"],
            "in-backward needs updates immediate, options inputs, state on device, weights on device; there are updates held",
        ),
        (["fit", "gpt2", "--device", "rtx9090"], "device 'rtx9090' is not known: rtx4090, rtx3090"),
        (["pareto", "none.json", "--device", "h800"], "'none.json' is neither a preset nor a file"),
    ],
)
def test_bad_input(arguments: list[str], message: str, config_file: Path, capsys: Capture) -> None:
    assert main([str(config_file) if argument == "CONFIG" else argument for argument in arguments]) == 1
    assert message in error_line(capsys)


def test_a_model_here_needs_a_budget_and_takes_no_offline_choices(model_dir: Path, capsys: Capture) -> None:
    assert main(["plan", str(model_dir), "--device", "cpu"]) == 1
    assert "--budget is needed: memory on cpu" in error_line(capsys)
    for option, reason in [
        (["--weights", "disk"], "here the planner decides which weights leave the device"),
        (["--host-memory", "1GB"], "here optimizer state has one place"),
        (["--overlap"], "here copies run beside compute"),
        (["--method", "hift"], "methods are planned to compare with, not to run"),
    ]:
        assert main(["plan", str(model_dir), "--budget", "1GB", *option]) == 1
        assert f"{option[0]} is for devices that are not here: {reason}" in error_line(capsys)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--state", "device,cloud", "'cloud' is no place: device, host, disk"),
        ("--options", "save,", "'save,' is not a list of options with commas between"),
        ("--method", "magic", "invalid choice: 'magic'"),
        ("--max-steps", "0", "'0' is not an integer of at least 1"),
        ("--prefer", "luck", "invalid choice: 'luck'"),
    ],
)
def test_values_that_are_not_there(option: str, value: str, message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "gpt2", "--device", "rtx4090", option, value])
    assert f"argument {option}: {message}" in capsys.readouterr().err


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(0, 3000), st.data())
def test_largest_is_the_last_number_that_holds(growth: list[int], limit: int, data: st.DataObject) -> None:
    needs = [sum(growth[: i + 1]) for i in range(len(growth))]
    asked: list[int] = []

    def need(number: int) -> int:
        asked.append(number)
        return needs[number - 1]

    start = data.draw(st.integers(1, len(needs)))
    assert largest(need, limit, start=start, most=len(needs)) == sum(nbytes <= limit for nbytes in needs)
    assert len(asked) == len(set(asked)) <= 16


def test_a_line_needs_few_trials() -> None:
    asked: list[int] = []

    def need(number: int) -> int:
        asked.append(number)
        return 17_000 + 83 * number + number // 7

    assert largest(need, 200_000, start=1, most=4096) == 2201
    assert len(asked) <= 6


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(2, 20))
def test_budgets_rise_from_the_smallest_to_the_largest(smallest: int, largest_nbytes: int, points: int) -> None:
    found = budgets_between(smallest, largest_nbytes, points)
    assert found == sorted(set(found))
    assert found[0] == smallest
    assert found[-1] == max(smallest, largest_nbytes)
    assert len(found) <= points
