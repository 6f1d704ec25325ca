"""A checkpoint that is damaged, or of something else, is refused with the reason before anything in model or optimizer changed."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from chunkft_compile import CheckpointError, ChunkedModule, latest_checkpoint, load_checkpoint, save_checkpoint
from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")
PLENTY = 10**8


def _model(model: nn.Module | None = None) -> tuple[ChunkedModule, Optimizer]:
    torch.manual_seed(0)
    compiled = compile_quickly(model or Mlp(), PLENTY)
    return compiled, AdamW(compiled.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, captures_once: Workshop) -> Path:
    """A checkpoint after one step."""
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, (Update.HELD,))
        model, optimizer = _model()
        torch.autograd.backward(compute_loss(model, vector_batch()))
        optimizer.step()
        return save_checkpoint(tmp_path_factory.mktemp("sound"), model, optimizer)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def _refused(checkpoint: Path, message: str, model: nn.Module | None = None, **loop: Any) -> None:
    compiled, optimizer = _model(model)
    torch.autograd.backward(compute_loss(compiled, vector_batch()))
    optimizer.step()
    before = _facts(compiled, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint, compiled, optimizer, **loop)
    assert all(torch.equal(*pair) for pair in zip(before, _facts(compiled, optimizer), strict=True))


def _facts(model: ChunkedModule, optimizer: Optimizer) -> list[torch.Tensor]:
    state = [value for leaf in model.parameters() for value in optimizer.state[leaf].values()]
    gradients = [leaf.grad for leaf in model.parameters() if leaf.grad is not None]
    position = torch.tensor([*model.progress[:3], model._session.steps])
    return [tensor.clone() for tensor in (*model.state_dict().values(), *state, *gradients, position, torch.get_rng_state())]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FILES = ("weights-00001.safetensors", "chunks-00001.safetensors", "training.pt", "plan.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "{} is missing"), (_shorten, r"{} has \d+ bytes, not \d+"), (_flip, "{} does not have its checksum")],
)
def test_damaged_files(copy: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / name)
    _refused(copy, "is damaged: " + message.format(name))
    found = latest_checkpoint(copy.parent)
    assert found == (copy if damage is _flip else None)  # what is incomplete is seen without reading everything


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "has no manifest.json"),
        (_shorten, "manifest.json does not have its checksum"),
        (lambda path: os.truncate(path, 100), "manifest.json cannot be read"),
        (lambda path: path.write_text(path.read_text().replace('"step": 1', '"step": 2')), "manifest.json does not have its checksum"),
        (lambda path: path.write_text('{"sha256": "", "body": {"format": 7}}'), "has format 7, this library reads 1"),
    ],
)
def test_damaged_manifests(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    if damage is _shorten:
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(text.replace("float32", "float64", 1))
    else:
        damage(copy / "manifest.json")
    _refused(copy, message)
    assert latest_checkpoint(copy.parent) is None


def test_a_sound_one_before_an_incomplete_one_is_the_latest(sound: Path, copy: Path) -> None:
    other = Path(shutil.copytree(sound, copy.parent / "step-000009"))
    (other / "training.pt").unlink()
    assert latest_checkpoint(copy.parent) == copy
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        load_checkpoint(copy.parent / "elsewhere", *_model())


class Wider(Mlp):
    """Another shape under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :3]


def _frozen() -> nn.Module:
    model = Mlp()
    model.middle.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wider, r"another model: leave.weight is float32 \[3, 8\] there and float32 \[4, 8\] here"),
        (lambda: Mlp().double(), r"another model: enter.weight is float32 \[8, 6\] there and float64 \[8, 6\] here"),
    ],
)
def test_other_models(sound: Path, model: Callable[[], nn.Module], message: str) -> None:
    compiled, optimizer = _model(model())
    before = [tensor.clone() for tensor in compiled.state_dict().values()]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(sound, compiled, optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, compiled.state_dict().values(), strict=True))


def test_another_trainable_set(sound: Path) -> None:
    compiled, optimizer = _model(_frozen())
    with pytest.raises(CheckpointError, match=r"trains 8 rows of middle.weight, here it is 0: freeze and train the same parameters"):
        load_checkpoint(sound, compiled, optimizer)


def test_another_optimizer(sound: Path) -> None:
    compiled = compile_quickly(Mlp(), PLENTY)
    with pytest.raises(CheckpointError, match="trained with AdamW, and here is SGD; build the same, in this order"):
        load_checkpoint(sound, compiled, SGD(compiled.parameters(), lr=1.0))
    leaves = list(compiled.parameters())
    with pytest.raises(CheckpointError, match="has 1 parameter groups, this AdamW has 2"):
        load_checkpoint(sound, compiled, AdamW([{"params": leaves[:1]}, {"params": leaves[1:]}]))


def test_schedulers_and_scalers_come_with_their_state(sound: Path, tmp_path: Path) -> None:
    model, optimizer = _model()
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(CheckpointError, match="has no scheduler, and scheduler= is a LambdaLR: leave it out"):
        load_checkpoint(sound, model, optimizer, scheduler=scheduler)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, scheduler=scheduler)
    with pytest.raises(CheckpointError, match="has the state of a LambdaLR; pass it as scheduler=, or the run would go on without it"):
        load_checkpoint(checkpoint, model, optimizer)
    with pytest.raises(CheckpointError, match="has the state of a LambdaLR, and scheduler= is a StepLR"):
        load_checkpoint(checkpoint, model, optimizer, scheduler=StepLR(optimizer, 1))


def test_a_full_disk_names_the_need_and_leaves_what_was_there(sound: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _model()
    load_checkpoint(copy, model, optimizer)
    parent, before = copy.parent, _hashes(copy)
    nothing = shutil._ntuple_diskusage(10**9, 10**9 - 5, 5)
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.runtime.archive.shutil.disk_usage", lambda path: nothing)
        with pytest.raises(OSError, match=r"step-000001-2 needs \d+ bytes and .* has 5 free; older checkpoints are untouched") as caught:
            save_checkpoint(parent, model, optimizer)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in parent.iterdir()] == [copy.name]
    assert _hashes(copy) == before


@pytest.mark.parametrize("limit", [100, 1_000, 4_000])
def test_a_write_that_fails_is_taken_back(copy: Path, limit: int) -> None:
    """The system refuses to let files grow: what fails is the shards first, then the rest."""
    model, optimizer = _model()
    load_checkpoint(copy, model, optimizer)
    parent, before = copy.parent, _hashes(copy)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            OSError, match=r"step-000001-2 was not written, it needs \d+ bytes: File too large; older checkpoints"
        ) as caught:
            save_checkpoint(parent, model, optimizer, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in parent.iterdir()] == [copy.name]
    assert _hashes(copy) == before
    assert save_checkpoint(parent, model, optimizer, keep=1).name == "step-000001-2"


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_the_manifest_says_what_is_there(sound: Path) -> None:
    body = json.loads((sound / "manifest.json").read_text())["body"]
    assert body["format"] == 1
    assert body["step"] == 1
    assert set(body["files"]) == set(FILES)
    assert body["about"]["torch"] == torch.__version__
    assert body["about"]["graph"]
