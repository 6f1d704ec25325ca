"""Tensors come back as they were, in pieces or whole."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.runtime import archive
from chunkft_compile.runtime.archive import FORMAT, Archive, CheckpointError, Manifest, describe, seal, write

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def _store(directory: Path, tensors: dict[str, torch.Tensor]) -> Archive:
    directory.mkdir()
    seal(directory, Manifest(FORMAT, 1, 0, {}, write(directory, "kind", tensors.items()), {}))
    return Archive(directory)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = torch.randint(-9, 9, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    return made.transpose(0, -1) if made.dim() > 1 and draw(st.booleans()) else made


@settings(deadline=None, max_examples=40)
@given(st.lists(tensors(), max_size=6), st.integers(1, 200), st.integers(1, 100))
def test_round_trip_at_any_shard_size(
    tmp_path_factory: pytest.TempPathFactory, given_tensors: list[torch.Tensor], shard: int, block: int
) -> None:
    named = {f"t{number}": tensor for number, tensor in enumerate(given_tensors)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "SHARD_NBYTES", shard)
        patch.setattr(archive, "_BLOCK_NBYTES", block)
        directory = tmp_path_factory.mktemp("archives") / "one"
        with _store(directory, named) as found:
            for name, tensor in named.items():
                assert describe(tensor) == (found.entry(name).dtype, found.entry(name).shape)
                read, target = found.read(name), torch.empty_like(tensor)
                found.copy(name, target)
                assert read.dtype == tensor.dtype
                assert torch.equal(read, tensor)
                assert torch.equal(target, tensor)
                if tensor.dim():
                    assert torch.equal(found.read(name, (1, 3)), tensor[1:3])


def test_shards_are_no_larger_than_rows_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SHARD_NBYTES", 64)
    named = {"large": torch.arange(40.0).view(10, 4), "small": torch.ones(4), "row": torch.ones(1, 100)}
    with _store(tmp_path / "one", named) as found:
        assert [(piece.start, piece.stop) for piece in found.entry("large").pieces] == [(0, 4), (4, 8), (8, 10)]
        assert len(found.entry("row").pieces) == 1
        assert found.entry("small").pieces[0].file == found.entry("large").pieces[-1].file == "kind-00003.safetensors"
        assert torch.equal(found.read("large"), named["large"])


def test_tensors_on_the_host_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(archive, "save_file", lambda shard, path: seen.extend(tensor.data_ptr() for tensor in shard.values()))
    tensor = torch.ones(4, 4)
    write(tmp_path, "kind", [("t", tensor)])
    assert seen == [tensor.data_ptr()]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest.json"):
        Archive(tmp_path)
