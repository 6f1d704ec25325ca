"""A checkpoint is opened without being read, placed weight by weight, and refused before anything is made of a damaged one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import chunkft_compile
from tests.models import bert, compute_loss, gpt2, llama, token_batch
from tests.support.allocator import Allocator


def _saved(directory: Path, model: nn.Module, **settings: Any) -> Path:
    save: Any = model.save_pretrained
    save(directory, **settings)
    return directory


def _load(path: Path, budget: int = 10**8, **settings: Any) -> chunkft_compile.ChunkedModule:
    return chunkft_compile.load(path, budget, solve_seconds=0.5, **settings)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("make", [llama, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_a_loaded_model_trains_as_the_model_it_was_saved_from(tmp_path: Path, make: Any, tied: bool) -> None:
    plain = make(tied=tied)
    path = _saved(tmp_path, plain, max_shard_size="20KB")
    found = []
    for model in (chunkft_compile.compile(plain, 10**8, solve_seconds=0.5), _load(path)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        losses = []
        for seed in range(3):
            loss = compute_loss(model, token_batch(seed))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_the_files_are_mapped_not_read_and_never_written(tmp_path: Path, allocator: Allocator) -> None:
    plain = llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    weights = sum(p.nbytes for p in plain.parameters())
    path = _saved(tmp_path, plain)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    del plain
    live = allocator.live()
    allocator.reset()
    model = _load(path, int(0.9 * weights), update="auto")
    assert allocator.peak() - live < 0.1 * weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    allocator.reset()
    steps = len(model.plan(**token_batch()).steps)
    assert allocator.peak() - live < weights  # what is placed on the device, and the costs that are measured
    first = model.module.get_parameter("model.layers.0.mlp.up_proj.weight").clone()
    for seed in range(steps):
        loss = compute_loss(model, token_batch(seed))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(first, model.module.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def _without_one(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def _with_another(path: Path) -> None:
    save_file(load_file(path) | {"stranger": torch.ones(2)}, path)


def _reshaped(path: Path) -> None:
    save_file(load_file(path) | {"model.norm.weight": torch.ones(3)}, path)


def _of_two_dtypes(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].bfloat16()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors is not a whole safetensors file: .* the file has \d+"),
        (_scramble, r"model\.safetensors is not a whole safetensors file: its header has"),
        (_without_one, r"lacks model\.norm\.weight; save it again"),
        (_with_another, "has beside those of the model stranger"),
        (_reshaped, r"model\.norm\.weight of .* is F32 \[3\], the model has torch\.float32 \[16\]"),
        (_of_two_dtypes, r"are of torch\.bfloat16, torch\.float32; convert them to one"),
        (Path.unlink, r"has no \*\.safetensors"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    path = _saved(tmp_path, llama())
    damage(path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        _load(path)


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        _load(tmp_path / "nowhere")
    path = _saved(tmp_path, bert())
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "bert"
    with pytest.raises(ValueError, match=r"lacks cls\.|has beside those of the model"):
        _load(path)
