"""The command `chunkft` from its arguments to its exit code, files and one-line errors."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkft_compile.cli import main
from tests.cli import engine

Capture = pytest.CaptureFixture[str]


def training(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    arguments = [
        "train",
        str(model),
        "--data",
        str(data),
        "--budget",
        "1GB",
        "--out",
        str(out),
        "--seq",
        "32",
        "--lr",
        "1e-2",
        "--device",
        "cpu",
    ]
    return [*arguments, *more]


def error_line(capsys: Capture) -> str:
    """The last line of stderr, which is all an error may say."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["", "plan", "train"])
def test_help_has_examples(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert "examples:\n  chunkft " in text
    assert "%(" not in text


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("chunkft ")


@pytest.mark.usefixtures("fake_engine")
def test_train_saves_a_model_that_loads_and_has_learned(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(training(model_dir, text_file, out, "--steps", "12", "--batch", "2", "--measure")) == 0
    said = capsys.readouterr().err
    before, after = (float(said.split(f"held-out perplexity {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before
    assert "plan: 3 steps a sweep" in said
    assert "loss " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    assert tokenizer("the")["input_ids"]
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.mark.usefixtures("fake_engine")
def test_train_on_jsonl_with_its_own_held_out_file(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x" * i}) + "\n" for i in range(1, 40)))
    out = tmp_path / "out"
    assert main(training(model_dir, data, out, "--eval-data", str(text_file), "--epochs", "0.5", "--accumulate", "2")) == 0
    said = capsys.readouterr().err
    assert "data: 39 sequences of 32 tokens, 27 held out" in said
    assert "10 cut to 32 tokens" in said
    assert (out / "model.safetensors").is_file()


@pytest.mark.usefixtures("fake_engine")
def test_out_is_kept_unless_told_to_replace_it(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(training(model_dir, text_file, out, "--steps", "1", "--eval-fraction", "0")) == 0
    first = (out / "model.safetensors").read_bytes()
    assert main(training(model_dir, text_file, out, "--steps", "2", "--eval-fraction", "0")) == 1
    assert "is not empty: pass another --out, or --overwrite" in error_line(capsys)
    assert main(training(model_dir, text_file, out, "--steps", "2", "--eval-fraction", "0", "--overwrite")) == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert main(training(model_dir, text_file, model_dir, "--overwrite")) == 1
    assert "is the model itself" in error_line(capsys)


@pytest.mark.usefixtures("fake_engine")
def test_a_budget_too_small_names_the_smallest(model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", str(model_dir), "--budget", "1kB", "--seq", "16"]) == 2
    line = error_line(capsys)
    advice = f"bound by backward of block 0; the smallest that does: --budget {engine.SMALLEST_NBYTES}B"
    assert line == f"chunkft: error: no plan within 1000 bytes ({advice})"
    assert main([*training(model_dir, text_file, tmp_path / "out"), "--budget", "1kB"]) == 2
    assert error_line(capsys) == line
    assert not (tmp_path / "out").exists()


def test_bad_input_is_found_before_the_model_is_loaded(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("chunkft_compile.cli.planned.load_weights", load)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n')
    out = tmp_path / "out"
    for arguments, message in [
        (training(model_dir, empty, out), f"chunkft: error: data file {empty} is empty: it needs text to train on"),
        (training(model_dir, broken, out), "broken.jsonl line 2: not JSON"),
        (training(model_dir, tmp_path / "none.txt", out), "none.txt does not exist"),
        (training(model_dir, text_file, out, "--eval-data", str(empty)), "empty.txt is empty"),
        (training(model_dir, text_file, text_file / "out"), "out cannot be written: not a directory"),
        (training(tmp_path / "none", text_file, out), "none does not exist: pass a local Hugging Face directory"),
        (training(model_dir, text_file, out, "--budget", "14"), "budget '14' is not an amount of memory: write \"14GB\""),
        (training(model_dir, text_file, out, "--seq", "100000"), "the data is 881 tokens long, one sequence needs 100000"),
        (training(model_dir, text_file, out, "--batch", "100"), "26 sequences are fewer than one batch of 100"),
        (training(model_dir, text_file, out, "--steps", "2", "--warmup", "2"), "--warmup 2 leaves none of the 2 steps"),
        (training(model_dir, text_file, out, "--device", "nowhere"), "--device 'nowhere' is no device name"),
        (training(model_dir, text_file, out, "--device", "meta"), "--device 'meta' is not on this machine"),
        (["plan", str(model_dir), "--budget", "1GB", "--json", str(tmp_path / "no" / "p.json")], "p.json cannot be written"),
    ]:
        assert main(arguments) == 1, message
        assert message in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "0"),
        ("--seq", "1"),
        ("--steps", "x"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--clip", "-1"),
        ("--eval-fraction", "1"),
        ("--dtype", "int8"),
    ],
)
def test_values_out_of_range(option: str, value: str, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(training(tmp_path, tmp_path, tmp_path, f"{option}={value}"))
    assert f"argument {option}: " in error_line(capsys)


@pytest.mark.usefixtures("fake_engine")
def test_a_sequence_longer_than_the_model(model_dir: Path, capsys: Capture) -> None:
    assert main(["plan", str(model_dir), "--budget", "1GB", "--seq", "129"]) == 1
    assert "--seq 129 is longer than the 128 positions" in error_line(capsys)


@pytest.mark.usefixtures("fake_engine")
def test_interrupted_while_training_or_saving_nothing_is_left(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method in ("forward", "save_pretrained"):
        with monkeypatch.context() as patch:
            patch.setattr(engine.FakeModel, method, interrupt)
            assert main(training(model_dir, text_file, tmp_path / "out", "--steps", "1", "--eval-fraction", "0")) == 130
        assert error_line(capsys) == "chunkft: interrupted; no model was saved"
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory"):
        main(["plan", str(tmp_path), "--budget", "lots", "--debug"])
