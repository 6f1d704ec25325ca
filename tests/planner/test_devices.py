"""Device specs: the roofline's two bounds, budgets, and refusals."""

from dataclasses import replace

import pytest

from chunkft_compile.planner import Placement
from chunkft_compile.planner.devices import DEVICES, find_device


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_complete(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert device.source
    assert 0 < device.budget_nbytes <= device.memory_nbytes
    assert device.flops_per_s["float32"] <= device.flops_per_s["tf32"] <= device.flops_per_s["bfloat16"]
    assert device.links[-1].capacity_nbytes is None
    assert (device.links[0].placement is Placement.HOST) is device.accelerator


def test_arithmetic_or_traffic_bounds_an_operator() -> None:
    device = find_device("a100-80")
    idle = device.us(0, 0, "bfloat16")
    assert idle == device.launch_us
    arithmetic = device.us(312e12 * 0.7, 0, "bfloat16") - idle
    assert arithmetic == pytest.approx(1e6)
    traffic = device.us(0, 2039e9 * 0.85, "bfloat16") - idle
    assert traffic == pytest.approx(1e6)
    assert device.us(312e12 * 0.7, 2039e9 * 0.85, "bfloat16") - idle == pytest.approx(1e6)  # overlapped, not added
    assert device.us(1e12, 0, "float32") > device.us(1e12, 0, "tf32") > device.us(1e12, 0, "bfloat16")
    assert device.us(1e12, 0, "bfloat16", attention=True) > device.us(1e12, 0, "bfloat16")


def test_the_budget_leaves_out_context_and_workspaces() -> None:
    device = find_device("RTX4090")
    assert 22 * 2**30 < device.budget_nbytes < 23 * 2**30
    assert find_device("h100").reserve_nbytes > find_device("a100-80").reserve_nbytes


def test_sizes_are_rounded_to_blocks() -> None:
    assert [find_device("h100").allocated_nbytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert find_device("cpu").allocated_nbytes(513) == 513


def test_an_unknown_device_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="device 'rtx9090' is not known: rtx4090, rtx3090"):
        find_device("rtx9090")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"launch_us": 0.0}, "must be positive"),
        ({"reserve_nbytes": 10**15}, "the reserve less than the memory"),
        ({"matmul_efficiency": 1.5}, r"efficiencies lie in \(0, 1\]"),
        ({"flops_per_s": {"float32": 1.0}}, "needs the peaks of float32, tf32 and bfloat16"),
    ],
)
def test_impossible_devices_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(find_device("h800"), **change)  # type: ignore[arg-type]
