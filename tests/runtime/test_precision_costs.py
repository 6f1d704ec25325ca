"""What an update costs in a precision: bytes as measured around real steps, modelled ones equal to them, and fp32 chunks left out."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from chunkft_compile.planner.devices import find_device
from chunkft_compile.runtime.chunks import split_parameters
from chunkft_compile.runtime.modelled_optimizers import make_optimizer
from chunkft_compile.runtime.optimizers import Layout
from chunkft_compile.runtime.precision import Precision, Rounding
from chunkft_compile.runtime.precision_costs import measure_update, model_update
from tests.support.allocator import Allocator

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS: list[Layout] = [((300, 200), BF16), ((300, 200), FP32), ((640,), BF16), ((1,), BF16), ((3, 40, 50), BF16)]
LARGE: Layout = ((4096, 512), BF16)  # rounded in eight pieces
WIDE = (Precision.MASTER, Precision.STOCHASTIC)


@pytest.mark.parametrize("precision", WIDE)
def test_state_is_fp32_and_a_master_is_a_part_of_it(precision: Precision) -> None:
    kept = 4 if precision is Precision.MASTER else 0
    cost = measure_update(AdamW([nn.Parameter(torch.zeros(2))]), LAYOUTS, CPU, precision).of_layout
    assert cost[LAYOUTS[0]].state_nbytes == (8 + kept) * 60_000
    assert cost[LAYOUTS[1]].state_nbytes == 8 * 60_000  # an fp32 parameter of a bf16 model
    assert cost[LAYOUTS[1]].gradient_copy_nbytes == cost[LAYOUTS[1]].weight_copy_nbytes == cost[LAYOUTS[1]].rounding_nbytes == 0
    assert (cost[LAYOUTS[3]].state_nbytes, cost[LAYOUTS[3]].counter_nbytes) == (0, 4 + 8 + kept)
    assert cost[LAYOUTS[0]].us > cost[LAYOUTS[1]].us


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd", "sgd-momentum"])
def test_modelled_bytes_are_those_measured(name: str, precision: Precision) -> None:
    layouts = [layout for layout in LAYOUTS if layout[0] != (1,)]  # the model takes their state for such as can move
    real = measure_update(make_optimizer(name, [nn.Parameter(torch.zeros(2))]), layouts, CPU, precision)
    found = model_update(name, layouts, find_device("cpu"), precision)
    for layout in layouts:
        a, b = found.of_layout[layout], real.of_layout[layout]
        assert (a.state_nbytes, a.counter_nbytes) == (b.state_nbytes, b.counter_nbytes), layout
        copies = (a.weight_copy_nbytes, a.gradient_copy_nbytes, a.rounding_nbytes)
        assert copies == (b.weight_copy_nbytes, b.gradient_copy_nbytes, b.rounding_nbytes), layout


@pytest.mark.parametrize("group", [[LARGE], [LARGE, LARGE], [((8,), BF16), ((64, 3), BF16)], [((), BF16)]], ids=len)
@pytest.mark.parametrize("precision", WIDE)
@pytest.mark.parametrize("fused", [True, False])
def test_transients_are_those_of_a_real_step(allocator: Allocator, precision: Precision, group: list[Layout], fused: bool) -> None:
    """To the byte but for scalars."""
    make = partial(AdamW, fused=True) if fused else partial(SGD, lr=0.1, foreach=False)
    weights = nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in group])
    chunks = split_parameters(weights, 1 << 40, wide=True)
    optimizer: Optimizer = make([chunk.leaf for chunk in chunks])
    cost = measure_update(optimizer, group, CPU, precision)
    rounding = Rounding(precision)
    for chunk in chunks:
        chunk.leaf.grad = torch.ones_like(chunk.rows)
    rounding.step(optimizer, chunks)
    before = allocator.live()
    allocator.reset()
    rounding.step(optimizer, chunks)
    measured = allocator.peak() - before
    assert allocator.live() == before
    assert 0 <= cost.transient_nbytes(group) - measured <= 80 * len(group)  # one-element tensors


def test_fp16_gradients_need_no_copy() -> None:
    cost = measure_update(None, [((300, 200), FP16)], CPU, Precision.MASTER).of_layout[(300, 200), FP16]
    assert (cost.gradient_copy_nbytes, cost.weight_copy_nbytes) == (0, 0)


def test_a_card_counts_in_blocks() -> None:
    cost = model_update("adamw", LAYOUTS, find_device("rtx4090"), Precision.STOCHASTIC)
    assert all(step.state_nbytes % 512 == step.weight_copy_nbytes % 512 == 0 for step in cost.of_layout.values())
    assert cost.of_layout[LAYOUTS[2]].weight_copy_nbytes == 2560
    plain = model_update("adamw", LAYOUTS, find_device("rtx4090"), Precision.PLAIN)
    assert cost.of_layout[LAYOUTS[0]].us > plain.of_layout[LAYOUTS[0]].us
