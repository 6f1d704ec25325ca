"""`pretrained`: what is no model is refused in one line; a directory is replaced whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from chunkft_compile.pretrained import check_model, check_out, load_model, load_tokenizer, load_weights, replace_directory, save_model


def test_round_trip(model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir, torch.float32)
    save_model(model, tokenizer, tmp_path / "out")
    again, words = load_model(tmp_path / "out", torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert words("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), again.state_dict()[name]), name


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "bad.gguf").write_bytes(b"GG")
    for name, message in [
        ("none", r"none does not exist: pass a local Hugging Face directory or a \.gguf file \(nothing is downloaded\)"),
        ("notes.md", r"does not end in \.gguf"),
        ("bad.gguf", r"bad\.gguf is not a GGUF file"),
        ("", r"has no config\.json; pass the file: .*bad\.gguf"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_model(tmp_path / name)


def test_a_directory_without_weights_or_with_broken_ones(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no weights \(\*\.safetensors"):
        load_weights(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match=r"the model of .* cannot be loaded: ") as caught:
        load_weights(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, tmp_path)
    load_weights(tmp_path, torch.float32)
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer\.json, \.\.\.\): copy"):
        load_tokenizer(tmp_path)


def test_a_broken_config(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"the model of .* cannot be loaded: ") as caught:
        load_weights(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_truncated_gguf(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ValueError, match=r"the model of .* cannot be loaded: "):
        load_weights(tmp_path / "cut.gguf", torch.float32)


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="file is a file: pass a directory"):
        check_out(tmp_path / "file", overwrite=False)
    with pytest.raises(ValueError, match=r"file/out cannot be written: .*directory"):
        check_out(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(ValueError, match="/proc/out cannot be written"):
        check_out(Path("/proc/out"), overwrite=False)
    with pytest.raises(ValueError, match="home is not empty: pass another --out, or --overwrite"):
        check_out(home, overwrite=False)
    with pytest.raises(ValueError, match="not a model: --overwrite only replaces models"):
        check_out(home, overwrite=True)
    (home / "config.json").write_text("{}")
    check_out(home, overwrite=True)
    check_out(tmp_path / "new" / "deep", overwrite=False)
    assert not (tmp_path / "new" / "deep").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        check_out(tmp_path / "out", overwrite=False)
    tmp_path.chmod(0o700)


def interrupted(out: Path) -> None:
    with replace_directory(out) as directory:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("one", "two"):
        with replace_directory(out) as directory:
            (directory / content).write_text(content)
            assert directory.parent == out.parent  # a rename, not a copy
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["two"]
