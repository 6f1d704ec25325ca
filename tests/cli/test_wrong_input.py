"""Wrong input to every command: one line that says what is wrong, an exit code that says so too, and not a byte lost or left behind.

`CASES` is a table; a new command gets its rows there, or `test_every_command_has_its_rows` fails.
"""

import argparse
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chunkft_compile import cli
from chunkft_compile.cli import main
from chunkft_compile.errors import BudgetError, MemoryPromiseError
from chunkft_compile.planner import to_json
from chunkft_compile.solving import read_plan

pytestmark = pytest.mark.usefixtures("captures_once")
Capture = pytest.CaptureFixture[str]

EVERYWHERE = ("missing file", "broken file", "interrupted", "terminated")
"""What is tried with every command."""


@dataclass(frozen=True)
class Case:
    """A command line with {names} of `place`, the kind of mistake, and what the error says.

    `raises` is raised where `at` is called, in place of what is there. A case with `engine` compiles the model, the others do not.
    """

    kind: str
    line: str
    message: str
    code: int = 1
    at: str = ""
    raises: Any = None
    engine: bool = False

    @property
    def command(self) -> str:
        return self.line.split()[0]


TRAIN = "train {model} --data {text} --budget 400kB --device cpu --seq 16 --steps 2 --eval-fraction 0 --out {out}"
PLAN = "plan {model} --budget 400kB --device cpu --seq 16"
FULL = OSError(28, "No space left on device")
SMALL = BudgetError("no plan within 400000 bytes", smallest_nbytes=500_000, binding="backward of block 0")
PROMISE = MemoryPromiseError("BACKWARD of block 1 needed 9 bytes more than planned", measured_nbytes=19, promised_nbytes=10)

CASES = [
    Case("missing file", "plan {none} --budget 1GB", "none does not exist: pass a local Hugging Face directory or a .gguf file"),
    Case("missing file", PLAN.replace("{model}", "{empty}"), "empty has no config.json"),
    Case("missing file", "plan {untrained} --budget 400kB", "untrained has no weights"),
    Case("broken file", PLAN.replace("{model}", "{broken}"), "broken cannot be loaded: "),
    Case("broken file", PLAN.replace("{model}", "{cut}"), "the model of {cut} cannot be loaded: "),
    Case("broken file", "plan {text} --budget 1GB", "is a file that does not end in .gguf"),
    Case("broken file", "plan {gguf} --budget 1GB", "is not a GGUF file: its first bytes are not 'GGUF'"),
    Case("broken file", "plan {broken} --device rtx4090", "config.json cannot be read as JSON"),
    Case("unwritable output", PLAN + " --json {none}/plan.json", "--json {none}/plan.json cannot be written: {none} is not a directory"),
    Case("unwritable output", PLAN + " --json {empty}", "--json {empty} cannot be written: {empty} is a directory"),
    Case("wrong value", PLAN + " --budget lots", "budget 'lots' is not an amount of memory"),
    Case("no plan", PLAN, "the smallest that does: --budget 500000B)", code=2, at="plan.planned_model", raises=SMALL),
    Case("interrupted", PLAN, "interrupted", code=130, at="planned.load_weights", raises=KeyboardInterrupt()),
    Case("terminated", PLAN, "interrupted", code=143, at="planned.load_weights", raises=signal.SIGTERM),
    Case("missing file", TRAIN.replace("{model}", "{none}"), "none does not exist"),
    Case("missing file", TRAIN.replace("{text}", "{none}.txt"), "data file {none}.txt does not exist"),
    Case("missing file", TRAIN + " --eval-data {none}.txt", "data file {none}.txt does not exist"),
    Case("missing file", TRAIN + " --schedule {none}", "the plan {none} cannot be read"),
    Case("missing file", TRAIN + " --config {none}", "--config {none} does not exist"),
    Case(
        "missing file",
        TRAIN.replace("{text}", "{chats}") + " --chat-template {none}",
        "--chat-template {none} cannot be read: No such file",
    ),
    Case("missing file", TRAIN + " --resume", "--resume finds no checkpoint in {out}.checkpoints"),
    Case("broken file", TRAIN.replace("{model}", "{broken}"), "broken cannot be loaded: "),
    Case("broken file", TRAIN.replace("{model}", "{cut}"), "the model of {cut} cannot be loaded: "),
    Case("broken file", TRAIN.replace("{text}", "{json}.jsonl"), "line 1: not JSON (Expecting value at column 13)"),
    Case("broken file", TRAIN.replace("{text}", "{chats}"), "the tokenizer has no chat template: pass one with --chat-template FILE"),
    Case("broken file", TRAIN + " --schedule {json}", "{json} is not a plan"),
    Case("broken file", TRAIN + " --config {json}", "--config {json} line 1: not YAML"),
    Case("broken file", TRAIN + " --config {text}", "--config {text} line 1: not KEY: VALUE"),
    Case("wrong value", TRAIN + " --config {yaml}", "{yaml} line 2: lr is 'fast', not a number"),
    Case("wrong value", TRAIN + " --batch 100", "sequences are fewer than one batch of 100"),
    Case("wrong value", TRAIN + " --packing", "--packing is for the examples of a .jsonl"),
    Case("wrong value", TRAIN + " --chat-template {json}", "is for rows with `messages`, and {text} has none"),
    Case("no plan", TRAIN, "the smallest that does: --budget 500000B)", code=2, at="fine_tune.planned_model", raises=SMALL),
    Case("another model", TRAIN.replace("--budget 400kB", "--schedule {plan}"), "this plan was made for something else", engine=True),
    Case("another model", TRAIN.replace("{out}", "{other_out}") + " --resume", "the checkpoint is of another model", engine=True),
    Case("unwritable output", TRAIN.replace("{out}", "{text}"), "output {text} is a file: pass a directory"),
    Case("unwritable output", TRAIN.replace("{out}", "{text}/out"), "{text}/out cannot be written: not a directory"),
    Case("unwritable output", TRAIN.replace("{out}", "{model}"), "output directory {model} is the model itself"),
    Case("unwritable output", TRAIN.replace("{out}", "{notes}") + " --overwrite", "holds something that is not a model"),
    Case("unwritable output", TRAIN.replace("{out}", "."), "--out . has no name of its own"),
    Case("unwritable output", TRAIN.replace("{out}", "{blocked}"), "{blocked}.checkpoints is not a directory"),
    Case("unwritable output", TRAIN + " --plan-json {none}/p.json", "--plan-json {none}/p.json cannot be written"),
    Case(
        "unwritable output", TRAIN + " --tensorboard {text}/runs", "--tensorboard {text}/runs cannot be written: {text} is not a directory"
    ),
    Case("unwritable output", TRAIN, "No space left on device", at="fine_tune.save_model", raises=FULL, engine=True),
    Case("failed", TRAIN, "needed 9 bytes more than planned", at="loop._backward", raises=PROMISE, engine=True),
    Case("failed", TRAIN, "out of memory", at="loop._backward", raises=torch.OutOfMemoryError("out of memory"), engine=True),
    Case(
        "failed",
        TRAIN,
        "this machine has too little memory left: ",
        at="loop._backward",
        raises=RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        engine=True,
    ),
    Case("interrupted", TRAIN, "interrupted; no model was saved", code=130, at="fine_tune.load_tokenizer", raises=KeyboardInterrupt()),
    Case("terminated", TRAIN, "interrupted; no model was saved", code=143, at="planned.load_weights", raises=signal.SIGTERM),
    Case("missing file", "fit {none} --device rtx4090", "is neither a preset nor a file"),
    Case("missing file", "fit {empty} --device rtx4090", "empty has no config.json"),
    Case("broken file", "fit {broken} --device rtx4090", "config.json cannot be read as JSON"),
    Case("broken file", "fit {other_json} --device rtx4090", "is not the config of a model"),
    Case("wrong value", "fit gpt2 --device rtx1", "rtx1"),
    Case("interrupted", "fit gpt2 --device rtx4090", "interrupted", code=130, at="offline.OfflineModel", raises=KeyboardInterrupt()),
    Case("terminated", "fit gpt2 --device rtx4090", "interrupted", code=143, at="offline.OfflineModel", raises=signal.SIGTERM),
    Case("missing file", "pareto {none} --device rtx4090", "is neither a preset nor a file"),
    Case("broken file", "pareto {broken} --device rtx4090", "config.json cannot be read as JSON"),
    Case("wrong value", "pareto gpt2 --device rtx1", "rtx1"),
    Case("interrupted", "pareto gpt2 --device rtx4090", "interrupted", code=130, at="offline.OfflineModel", raises=KeyboardInterrupt()),
    Case("terminated", "pareto gpt2 --device rtx4090", "interrupted", code=143, at="offline.OfflineModel", raises=signal.SIGTERM),
    Case("missing file", "report {none}", "the plan {none} cannot be read"),
    Case("missing file", "report {plan} --run {none}", "the run {none} cannot be read"),
    Case("broken file", "report {json}", "{json} is not a plan: this is not JSON"),
    Case("broken file", "report {other_json}", "{other_json} is not a plan: expected an object with the fields version"),
    Case("broken file", "report {schedule}", "{schedule} is not a plan: this text holds a 'Schedule', expected a 'Plan'"),
    Case("broken file", "report {old}", "{old} is not a plan: this text has version 3, this library reads version"),
    Case("broken file", "report {plan} --run {json}", "{json} holds no complete line"),
    Case("wrong value", "report {plan} -o {none}.doc", "-o {none}.doc does not say its format"),
    Case("wrong value", "report {plan} --format memory-viz", "memory-viz is for a file, not for standard output"),
    Case("unwritable output", "report {plan} -o {empty} --format table", "-o {empty} cannot be written: {empty} is a directory"),
    Case("wrong value", "report {plan} --format html", "html is for a file, not for standard output"),
    Case("wrong value", "report {plan} --format json --run {none}", "--run is for the formats table, markdown, html"),
    Case("unwritable output", "report {plan} -o {none}/plan.html", "-o {none}/plan.html cannot be written: {none} is not a directory"),
    Case("unwritable output", "report {plan} -o {plan}.md", "No space left on device", at="report.write_whole", raises=FULL),
    Case("interrupted", "report {plan}", "interrupted", code=130, at="report.summary", raises=KeyboardInterrupt()),
    Case("terminated", "report {plan}", "interrupted", code=143, at="report.summary", raises=signal.SIGTERM),
    Case("missing file", "explain {none}", "the plan {none} cannot be read"),
    Case("broken file", "explain {json}", "{json} is not a plan: this is not JSON"),
    Case("broken file", "explain {schedule}", "this text holds a 'Schedule', expected a 'Plan'"),
    Case("broken file", "explain {old}", "this text has version 3"),
    Case("wrong value", "explain {plan} --step 99", "99"),
    Case("wrong value", "explain {plan} --at nowhere", "nowhere"),
    Case("interrupted", "explain {plan}", "interrupted", code=130, at="explain.reasons", raises=KeyboardInterrupt()),
    Case("terminated", "explain {plan}", "interrupted", code=143, at="explain.reasons", raises=signal.SIGTERM),
    Case("missing file", "diff {plan} {none}", "the plan {none} cannot be read"),
    Case("broken file", "diff {json} {plan}", "{json} is not a plan: this is not JSON"),
    Case("broken file", "diff {plan} {schedule}", "this text holds a 'Schedule', expected a 'Plan'"),
    Case("broken file", "diff {plan} {old}", "this text has version 3"),
    Case("interrupted", "diff {plan} {plan}", "interrupted", code=130, at="diff.differences", raises=KeyboardInterrupt()),
    Case("terminated", "diff {plan} {plan}", "interrupted", code=143, at="diff.differences", raises=signal.SIGTERM),
    Case("unwritable output", TRAIN + " --record {none}/r.jsonl", "--record {none}/r.jsonl cannot be written: {none} is not a directory"),
    Case("unwritable output", TRAIN + " --record {text}", "--record {text} is there already, and may be another run"),
    Case("missing file", "doctor {none}", "none does not exist"),
    Case("broken file", "doctor {broken}", "config.json cannot be read as JSON"),
    Case("broken file", "doctor {gguf}", "is not a GGUF file"),
    Case("wrong value", "doctor --device nowhere", "--device 'nowhere' is no device name"),
    Case("interrupted", "doctor gpt2", "interrupted", code=130, at="doctor.examine", raises=KeyboardInterrupt()),
    Case("terminated", "doctor gpt2", "interrupted", code=143, at="doctor.examine", raises=signal.SIGTERM),
]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Another model, its plan and a checkpoint of its training."""
    place = tmp_path_factory.mktemp("other")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, eos_token_id=256, **sizes)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    line = TRAIN.format(model=place / "model", text=place / "text.txt", out=place / "out")
    assert main([*line.split(), "--plan-json", str(place / "plan.json"), "--checkpoint-every", "2", "--keep", "1"]) == 0
    shutil.rmtree(place / "out")
    return place


@pytest.fixture
def place(model_dir: Path, other: Path, text_file: Path, tmp_path: Path) -> dict[str, Path]:
    """Names of files and directories, right and wrong; none of them is "{none}" or "{out}"."""
    found = {name: tmp_path / name for name in ("none", "out", "empty", "broken", "cut", "untrained", "gguf", "json", "yaml", "blocked")}
    found |= {"model": shutil.copytree(model_dir, tmp_path / "model"), "text": text_file, "plan": tmp_path / "plan.json"}
    found["empty"].mkdir()
    found["notes"] = tmp_path / "notes"
    found["notes"].mkdir()
    (found["notes"] / "notes.txt").write_text("years of work")
    shutil.copytree(model_dir, found["broken"])
    (found["broken"] / "config.json").write_text('{"model_type": ')
    shutil.copytree(model_dir, found["cut"])
    weights = (found["cut"] / "model.safetensors").read_bytes()
    (found["cut"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(model_dir, found["untrained"], ignore=shutil.ignore_patterns("*.safetensors"))
    found["gguf"] = tmp_path / "model.gguf"
    found["gguf"].write_text("GGML")
    found["json"].write_text('{"version": ')
    (tmp_path / "json.jsonl").write_text('{"version": ')
    found["other_json"] = tmp_path / "config.json"
    found["other_json"].write_text("{}")
    found["yaml"].write_text("seed: 1\nlr: fast\n")
    found["chats"] = tmp_path / "chats.jsonl"
    found["chats"].write_text(json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}) + "\n")
    (tmp_path / "blocked.checkpoints").write_text("a file")
    shutil.copy(other / "plan.json", found["plan"])
    found["schedule"], found["old"] = tmp_path / "schedule.json", tmp_path / "old.json"
    found["schedule"].write_text(to_json(read_plan(found["plan"]).schedule))
    found["old"].write_text(json.dumps(json.loads(found["plan"].read_text()) | {"version": 3}))
    found["other_out"] = tmp_path / "other"
    shutil.copytree(other / "out.checkpoints", tmp_path / "other.checkpoints")
    return found


@pytest.fixture(autouse=True)
def _handlers_are_as_before() -> Iterator[None]:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def _files(directory: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.kind.replace(' ', '-')}")
def test_one_line_an_exit_code_and_nothing_lost(
    case: Case, place: dict[str, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **__: Any) -> Any:
        if isinstance(case.raises, signal.Signals):
            signal.raise_signal(case.raises)
        raise case.raises

    def compiling(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was compiled before its input was found wrong")

    if case.at:
        monkeypatch.setattr(f"chunkft_compile.cli.{case.at}", raising)
    if not case.engine:
        monkeypatch.setattr("chunkft_compile.compile", compiling)
    before = _files(tmp_path)
    assert main(case.line.format(**place).split()) == case.code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *_, last = said.strip().splitlines()
    assert last.startswith("chunkft: " if case.kind in ("interrupted", "terminated") else "chunkft: error: ")
    assert case.message.format(**place) in last
    assert said.count("chunkft: ") == 1
    assert _files(tmp_path) == before


def test_every_command_has_its_rows() -> None:
    parser = cli._parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = {(case.command, case.kind) for case in CASES}
    assert {(command, kind) for command in commands.choices for kind in EVERYWHERE} <= found


@pytest.mark.parametrize("command", ["plan {model} --seq 1", "train", "fit", "pareto gpt2", "doctor --batch x", "nothing", ""])
def test_what_argparse_refuses_has_exit_code_2(command: str, place: dict[str, Path], capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command.format(**place).split())
    said = capsys.readouterr().err
    assert "error: " in said.splitlines()[-1]


def test_a_failed_run_says_what_is_kept(place: dict[str, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkft_compile.cli.fine_tune.save_model", lambda *_: (_ for _ in ()).throw(FULL))
    assert main([*TRAIN.format(**place).split(), "--checkpoint-every", "2"]) == 1
    *_, kept, error = capsys.readouterr().err.splitlines()
    assert kept.startswith("the checkpoint of step 2 is complete; go on with: chunkft train ")
    assert error == "chunkft: error: [Errno 28] No space left on device"
    monkeypatch.undo()
    assert main(kept.partition("go on with: chunkft ")[2].split()) == 0
    assert (place["out"] / "model.safetensors").is_file()
