"""`config` and `configuring`: one dataclass makes flags, files, help and checks; files go round; every refusal is one line."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.cli import main
from chunkft_compile.cli.config import INSTEAD, TrainConfig
from chunkft_compile.cli.configuring import add_flags, merge, options, read_file, to_plain, to_yaml
from chunkft_compile.cli.options import flag

Capture = pytest.CaptureFixture[str]

NEEDED: dict[str, Any] = {"model": Path("m"), "data": Path("d.txt"), "out": Path("o")}
GIVEN = ["m", "--data", "d.txt", "--out", "o"]


def write(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The fields that these flags give, alone."""
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    return merge(TrainConfig, {}, vars(parser.parse_args(arguments)))


def test_every_option_has_a_flag_a_key_and_a_line_of_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are broken within words, too
    for name, option in options(TrainConfig).items():
        assert (flag(name) if not option.positional else "MODEL") in text
        assert "".join(option.help.split()) in text
    assert list(to_plain(TrainConfig(**NEEDED))) == [field.name for field in dataclasses.fields(TrainConfig)]


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parsed(GIVEN) == NEEDED
    assert TrainConfig(**parsed(GIVEN)) == TrainConfig(**NEEDED)


configs = st.builds(
    TrainConfig,
    **{name: st.just(value) for name, value in NEEDED.items()},
    budget=st.sampled_from([None, "14GB", "80%", "13.5 GiB"]),
    schedule=st.sampled_from([None, Path("a: b #c.json")]),
    precision=st.sampled_from([None, "master"]),
    steps=st.one_of(st.none(), st.integers(1, 10**9)),
    warmup=st.one_of(st.none(), st.integers(0, 99)),
    lr=st.floats(1e-300, 1e300),
    eval_fraction=st.floats(0.001, 0.999),
    eval_every=st.integers(1, 99),
    packing=st.booleans(),
    keep_best=st.booleans(),
)


@settings(deadline=None)  # the machine may be busy
@given(configs)
def test_what_is_printed_is_read_as_the_same(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = write(tmp_path_factory.mktemp("config"), to_yaml(config))
    assert TrainConfig(**read_file(path, TrainConfig)) == config


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d.txt\nout: o\nlr: 1e-4\nsteps: 9\nclip: 2\npacking: true\nbatch:\n  4 # rows\n")
    kept = read_file(path, TrainConfig)
    assert kept == {**NEEDED, "lr": 1e-4, "steps": 9, "clip": 2.0, "packing": True, "batch": 4}
    assert isinstance(kept["clip"], float)
    given = parsed([*GIVEN, "--lr", "3", "--epochs", "2", "--no-packing", "--seq", "8"])
    config = TrainConfig(**merge(TrainConfig, kept, given, instead=INSTEAD))
    assert (config.lr, config.epochs, config.steps, config.packing, config.seq, config.batch) == (3.0, 2.0, None, False, 8, 4)
    assert TrainConfig(**merge(TrainConfig, kept, parsed(GIVEN), instead=INSTEAD)).steps == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", r"run\.yaml line 1: there is no key 'learning_rate' \(here 1\); there are model, data, out, "),
        ("lr: 1\neval-every: 2", r"run\.yaml line 2: there is no key 'eval-every' \(here 2\); did you mean eval_every\?"),
        ("sed: 2", r"line 1: there is no key 'sed' \(here 2\); did you mean seed\?"),
        ("lr: fast", r"run\.yaml line 1: lr is 'fast', not a number \(highest learning rate\)"),
        ("lr: -1", r"line 1: lr: '-1' is not a number above 0"),
        ("lr: .nan", r"line 1: lr: 'nan' is not a number above 0"),
        ("lr:", r"line 1: lr has no value: a number"),
        ("batch: 2.5", r"line 1: batch is 2\.5, not an integer \(sequences in a batch\)"),
        ("batch: true", r"line 1: batch is True, not an integer"),
        ("batch: '2'", r"line 1: batch is '2', not an integer"),
        ("batch: 0", r"line 1: batch: '0' is not an integer of at least 1"),
        ("packing: 1", r"line 1: packing is 1, not true or false"),
        ("budget: 900", r"line 1: budget is 900, not a text \(memory on the device: .14GB"),
        ("data: [a, b]", r"line 1: data is \['a', 'b'\], not a path"),
        ("dtype: bflot16", r"line 1: dtype is 'bflot16', not one of float32, bfloat16, fp32, bf16; did you mean bfloat16\?"),
        ("optimizer: 7", r"line 1: optimizer is 7, not one of adamw, adamw-fused"),
        ("seed: 1\nlr: 1\nseed: 2", r"line 3: seed is given twice, first in line 1"),
        ("seed: 1\n  lr: 2", r"run\.yaml line 2: not YAML \(mapping values are not allowed here\)"),
        ("seed: [1", r"run\.yaml line 1: not YAML"),
        ("- seed", r"run\.yaml line 1: not KEY: VALUE"),
        ("seed", r"run\.yaml line 1: not KEY: VALUE"),
        ("# nothing", r"run\.yaml is empty: it needs lines of KEY: VALUE"),
        ("seed: !!python/object:os.system 1", r"run\.yaml line 1: not YAML \(could not determine a constructor"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_file(write(tmp_path, text), TrainConfig)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config .*none\.yaml does not exist"):
        read_file(tmp_path / "none.yaml", TrainConfig)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_file(tmp_path, TrainConfig)
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff")
    with pytest.raises(ValueError, match="cannot be read: 'utf-8' codec"):
        read_file(path, TrainConfig)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "epochs is 1 and steps is 3: only one of them"),
        ({"eval_every": 2, "eval_fraction": 0.0}, "--eval-every 2 needs something held out"),
        ({"patience": 2}, "--patience goes by evaluations during the training: pass --eval-every N"),
        ({"keep_best": True}, "--keep-best goes by evaluations"),
        ({"batch": 0}, "batch: '0' is not an integer of at least 1"),
        ({"lr": "1"}, "lr is '1', not a number"),
        ({"lr_schedule": "cosin"}, "lr_schedule is 'cosin', not one of constant, linear, cosine; did you mean cosine"),
        ({"model": None}, "model has no value"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**NEEDED, **fields})


def test_what_is_missing_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path, "data: d.txt\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", str(path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "chunkft train: error: the following arguments are required: MODEL, --out (or model, out in a --config file)"


def test_without_yaml_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("chunkft_compile.cli.configuring.importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"reading .*run\.yaml needs the package PyYAML: pip install 'chunkft_compile\[hf\]'"):
        read_file(write(tmp_path, "seed: 1"), TrainConfig)


@pytest.mark.usefixtures("captures_once")
def test_a_dry_run_trains_and_writes_nothing_and_what_it_prints_runs(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "deep" / "out", tmp_path / "plan.json"
    arguments = ["train", str(model_dir), "--data", str(text_file), "--out", str(out), "--budget", "400kB", "--device", "cpu"]
    arguments += ["--seq", "16", "--steps", "2", "--lr", "1e-3", "--plan-json", str(plan)]
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.cli.fine_tune.Training", None)
        assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "plan: " in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "text.txt"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    (plan_event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = yaml.safe_load(said.out)
    assert plan_event["event"] == "plan"
    assert plan_event["config"] == {**kept, "json": True}
    assert kept["lr"] == 1e-3
    assert kept["budget"] == "400kB"
    path = write(tmp_path, said.out)
    assert main(["train", "--config", str(path)]) == 0
    assert (out / "model.safetensors").is_file()
    assert main(["train", "--config", str(path), "--schedule", str(plan), "--overwrite"]) == 0
