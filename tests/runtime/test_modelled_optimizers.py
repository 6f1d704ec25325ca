"""Optimizer costs from small tensors: state equals that of the real optimizer, transients bound it, and no large tensor is made."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from chunkft_compile.planner.devices import find_device
from chunkft_compile.runtime.modelled_optimizers import OPTIMIZERS, make_optimizer, model_optimizer
from chunkft_compile.runtime.optimizers import Layout, measure_optimizer, spare_nbytes
from tests.support.allocator import allocator_or_skip

CPU = torch.device("cpu")
LAYOUTS: list[Layout] = [
    ((300, 200), torch.float32),
    ((7, 640), torch.float32),
    ((640, 64), torch.bfloat16),
    ((1000,), torch.float32),
    ((3, 40, 50), torch.float32),
]
HUGE: Layout = ((128_256, 4096), torch.bfloat16)
needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install '.[8bit]'")
many = pytest.mark.parametrize("name", [pytest.param(name, marks=[needs_package] if "8bit" in name else []) for name in OPTIMIZERS])


@many
def test_state_and_transients_are_those_of_the_real_optimizer(name: str) -> None:
    modelled = model_optimizer(name, LAYOUTS, find_device("cpu"))
    for layout in [layout for layout in LAYOUTS if name != "adafactor" or layout[1] is torch.float32]:
        real = measure_optimizer(make_optimizer(name, [nn.Parameter(torch.zeros(2))]), [layout], CPU).of_layout[layout]
        found = modelled.of_layout[layout]
        assert (found.state_nbytes, found.counter_nbytes) == (real.state_nbytes, real.counter_nbytes), layout
        peak = real.transient_nbytes - spare_nbytes(layout, real.state_nbytes, CPU)  # what that one step took
        assert peak <= found.transient_nbytes <= 1.05 * real.transient_nbytes + 512, layout
        assert found.us > 0


def test_bf16_norms_on_a_cpu_are_the_known_exception() -> None:
    """Adafactor takes norms, and the CPU copies bf16 arguments of some shapes to fp32, others not: no trial shape tells."""
    layout: Layout = ((640, 64), torch.bfloat16)
    real = measure_optimizer(make_optimizer("adafactor", [nn.Parameter(torch.zeros(2))]), [layout], CPU).of_layout[layout]
    found = model_optimizer("adafactor", [layout], find_device("cpu")).of_layout[layout]
    assert found.state_nbytes == real.state_nbytes
    assert real.transient_nbytes <= found.transient_nbytes + 4 * 640 * 64


def test_adamw_on_a_card_steps_all_at_once_and_counts_on_the_host() -> None:
    layout: Layout = ((1024, 1024), torch.bfloat16)
    card = model_optimizer("adamw", [layout], find_device("rtx4090"))
    assert card.of_layout[layout].state_nbytes == 2 * 2 * 2**20
    assert card.of_layout[layout].counter_nbytes == 0
    assert 2 * 2**20 <= card.of_layout[layout].transient_nbytes <= 2 * 2**20 + 8192
    assert min(card.overlap) > 0.75
    fused = model_optimizer("adamw-fused", [layout], find_device("rtx4090"))
    assert fused.of_layout[layout].transient_nbytes <= 9 * 512  # scalars
    assert fused.of_layout[layout].counter_nbytes == 512
    assert fused.of_layout[layout].us < card.of_layout[layout].us


def test_time_of_fused_adamw_is_its_traffic() -> None:
    device = find_device("a100-80")
    layout: Layout = ((8192, 8192), torch.float32)
    us = model_optimizer("adamw-fused", [layout], device).of_layout[layout].us
    # reads weight, gradient and two moments, writes all but the gradient (which the operator declares as written)
    traffic = 8 * 4 * 8192**2
    assert us == pytest.approx(device.us(0, traffic, "float32"), rel=0.01)


def test_the_state_of_a_factored_optimizer_is_two_sides() -> None:
    cost = model_optimizer("adafactor", [((4096, 1024), torch.float32)], find_device("h100"))
    assert cost.of_layout[(4096, 1024), torch.float32].state_nbytes == 4 * (4096 + 1024)


@many
def test_a_huge_chunk_takes_no_memory(name: str) -> None:
    allocator = allocator_or_skip()
    allocator.reset()
    before = allocator.live()
    cost = model_optimizer(name, [HUGE], find_device("rtx4090"))
    assert allocator.peak() - before < 32 * 2**20
    assert cost.of_layout[HUGE].us > 1000


def test_an_unknown_optimizer_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="optimizer 'lion' is not known: adamw, adamw-fused, adamw-8bit, sgd"):
        make_optimizer("lion", [nn.Parameter(torch.zeros(2))])
