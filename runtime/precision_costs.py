"""What an update of a chunk costs in a precision: the optimizer's step on fp32 leaves, and the copies and rounding around it.

Chunks are told apart by the layout of their weights: an fp32 parameter of a bf16 model has no master.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from chunkft_compile.planner.devices import Device
from chunkft_compile.runtime.chunks import is_half, rounded_nbytes, split_parameters
from chunkft_compile.runtime.meter import measure_calls
from chunkft_compile.runtime.modelled_optimizers import model_optimizer
from chunkft_compile.runtime.optimizers import Layout, OptimizerCost, StepCost, measure_optimizer
from chunkft_compile.runtime.precision import Precision, Rounding, gradient_dtype, piece_rows

# Bytes per element of a piece: random bits, the mask of finite values and what makes it; a rounded copy, the comparison, a wide copy.
_ROUNDING_NBYTES = {Precision.STOCHASTIC: 7, Precision.MASTER: 5}
_ROUNDING_TENSORS = 4  # that these bytes are divided into: an accelerator rounds each up
_SCALARS_NBYTES = 64  # Python numbers become tensors of one element
# Bytes per element that casts, comparison and rounding read and write, operator by operator.
_TRAFFIC_NBYTES = {Precision.STOCHASTIC: 70, Precision.MASTER: 42}


def measure_update(optimizer: Optimizer | None, layouts: Iterable[Layout], device: torch.device, precision: Precision) -> OptimizerCost:
    """`measure_optimizer` for weights of these layouts that are trained in `precision`."""
    distinct = set(layouts)
    cost = measure_optimizer(optimizer, map(_leaf_layout(precision), distinct), device)
    half = [layout for layout in distinct if _is_wide(layout, precision)]
    if not half:
        return cost
    largest = max(half, key=_numel)
    us = measure_rounding(largest, device, precision) / _numel(largest)
    return _widened(cost, distinct, precision, lambda nbytes: rounded_nbytes(nbytes, device), lambda numel: math.ceil(us * numel))


def model_update(name: str, layouts: Iterable[Layout], device: Device, precision: Precision) -> OptimizerCost:
    """`model_optimizer` for weights of these layouts that are trained in `precision`."""
    distinct = set(layouts)
    cost = model_optimizer(name, map(_leaf_layout(precision), distinct), device)
    traffic = _TRAFFIC_NBYTES.get(precision, 0)
    return _widened(cost, distinct, precision, device.allocated_nbytes, lambda numel: math.ceil(device.us(0, traffic * numel, "float32")))


def measure_rounding(layout: Layout, device: torch.device, precision: Precision) -> float:
    """Microseconds of everything around the optimizer's step of one chunk."""
    weights = nn.ParameterList([nn.Parameter(torch.zeros(layout[0], dtype=layout[1], device=device))])
    (chunk,) = split_parameters(weights, weights[0].nbytes, wide=True)
    chunk.leaf.grad = torch.zeros(layout[0], dtype=gradient_dtype(layout[1], precision), device=device)
    optimizer, rounding = SGD([chunk.leaf]), Rounding(precision, device)
    rounding.begin(optimizer, [chunk]).finish()  # a master is made at the first
    (call,) = measure_calls([lambda: rounding.begin(optimizer, [chunk]).finish()], device)
    return call.seconds * 1e6


def _leaf_layout(precision: Precision) -> Callable[[Layout], Layout]:
    """From the layout of a chunk's weights to that of its leaf while it is stepped."""
    return lambda layout: (layout[0], torch.float32) if _is_wide(layout, precision) else layout


def _is_wide(layout: Layout, precision: Precision) -> bool:
    return precision is not Precision.PLAIN and is_half(layout[1])


def _widened(
    cost: OptimizerCost, layouts: Iterable[Layout], precision: Precision, allocated: Callable[[int], int], us_of: Callable[[int], int]
) -> OptimizerCost:
    """The cost of leaves as that of weights. `allocated(nbytes)` is what the device counts, `us_of(numel)` the time around a step."""
    leaf = _leaf_layout(precision)
    found = {
        layout: _with_copies(cost.of_layout[leaf(layout)], layout, precision, allocated, us_of)
        if _is_wide(layout, precision)
        else cost.of_layout[layout]
        for layout in layouts
    }
    return replace(cost, of_layout=found)


def _with_copies(
    step: StepCost, layout: Layout, precision: Precision, allocated: Callable[[int], int], us_of: Callable[[int], int]
) -> StepCost:
    numel = _numel(layout)
    copy_nbytes = allocated(4 * numel)
    kept = copy_nbytes if precision is Precision.MASTER else 0
    piece = min(numel, piece_rows(layout[0]) * (numel // layout[0][0] if layout[0] else 1))
    return replace(
        step,
        state_nbytes=step.state_nbytes + (kept if numel > 1 else 0),
        counter_nbytes=step.counter_nbytes + (kept if numel == 1 else 0),
        us=step.us + us_of(numel),
        weight_copy_nbytes=copy_nbytes - kept,
        gradient_copy_nbytes=0 if gradient_dtype(layout[1], precision) == torch.float32 else copy_nbytes,
        rounding_nbytes=allocated(_ROUNDING_NBYTES[precision] * piece + _SCALARS_NBYTES) + (_ROUNDING_TENSORS - 1) * (allocated(1) - 1),
    )


def _numel(layout: Layout) -> int:
    return math.prod(layout[0])
