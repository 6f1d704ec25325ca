"""Which stores a device has, and what the way to them is measured to be."""

from pathlib import Path

import pytest
import torch

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.host_store import HostStore
from chunkft_compile.runtime.stores import Stores, measure_link

CPU = torch.device("cpu")


def test_a_cpu_has_a_disk(tmp_path: Path) -> None:
    stores = Stores(CPU, tmp_path)
    assert stores.placements == (Placement.DISK,)
    store = stores[Placement.DISK]
    assert isinstance(store, FileStore)
    assert stores[Placement.DISK] is store
    stand_in = store.put("a", torch.ones(1000)).tensor
    stores.synchronize()
    assert torch.equal(stand_in, torch.ones(1000))
    assert stores.nbytes == store.nbytes == 4096


def test_an_accelerator_has_the_host_too() -> None:
    assert Stores(torch.device("cuda"), None).placements == (Placement.HOST, Placement.DISK)


def test_the_host_is_no_place_beside_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cpu keeps nothing on host, only on disk"):
        Stores(CPU, tmp_path)[Placement.HOST]
    with pytest.raises(ValueError, match="nothing can be kept there, only on a disk"):
        HostStore(CPU)


def test_the_temporary_directory_is_the_default() -> None:
    assert isinstance(Stores(CPU, None)[Placement.DISK], FileStore)


def test_a_store_that_is_not_used_is_not_opened(tmp_path: Path) -> None:
    stores = Stores(CPU, tmp_path / "nowhere")
    assert stores.nbytes == 0
    with pytest.raises(ValueError, match="nowhere, does not exist"):
        stores[Placement.DISK]


def test_speed_is_measured(tmp_path: Path) -> None:
    link = measure_link(CPU, tmp_path, Placement.DISK)
    assert link.placement is Placement.DISK
    assert 10**6 < link.read_bytes_per_s < 10**12
    assert 10**6 < link.write_bytes_per_s < 10**12
    assert link.overlaps
    assert measure_link(CPU, tmp_path, Placement.DISK) is link
