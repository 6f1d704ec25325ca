"""What the runtime must know of the user's optimizer: where it is, what it trains, and what a step of it costs in bytes and time."""

import gc
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import BLOCK_NBYTES, storage_nbytes
from chunkft_compile.runtime.meter import measure_calls

_SCALARS_NBYTES = 64  # one-element temporaries (bias corrections) do not scale with the chunk

Layout = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a chunk: what its state depends on."""


@dataclass(frozen=True)
class StepCost:
    """One chunk in an optimizer step.

    `state_nbytes` can leave the device between steps, `counter_nbytes` (tensors of one element) stays; `transient_nbytes` is
    allocated and freed inside the step, which takes `us` microseconds. Around it there may be fp32 copies of the weights and
    of the gradient, and what rounding takes when the latter is gone (see `precision`).
    """

    state_nbytes: int
    counter_nbytes: int
    transient_nbytes: int
    us: int
    weight_copy_nbytes: int = 0
    gradient_copy_nbytes: int = 0
    rounding_nbytes: int = 0


@dataclass(frozen=True)
class OptimizerCost:
    """What stepping chunks costs, by layout, on the device they were measured on.

    `overlap` is the transient of two equal chunks stepped together over that of one: 1 where the optimizer goes chunk by
    chunk, 2 where it takes all at once (foreach).
    """

    name: str
    of_layout: dict[Layout, StepCost]
    overlap: float

    def transient_nbytes(self, layouts: Sequence[Layout]) -> int:
        """Bytes while stepping chunks of these layouts together, at most: copies are there for all of them, and rounded one by one."""
        costs = [self.of_layout[layout] for layout in layouts]
        transients = [cost.transient_nbytes for cost in costs]
        together = sum(transients) if self.overlap > 1.75 else round(max(transients) * self.overlap)
        step = min(together, sum(transients)) if len(transients) > 1 else transients[0]
        weights, gradients = sum(cost.weight_copy_nbytes for cost in costs), sum(cost.gradient_copy_nbytes for cost in costs)
        return weights + max(gradients + step, *(cost.rounding_nbytes for cost in costs))

    def us(self, layouts: Sequence[Layout]) -> int:
        """Microseconds of stepping chunks of these layouts: a chunk costs the same alone and among others."""
        return sum(self.of_layout[layout].us for layout in layouts)

    def alone_nbytes(self, layout: Layout) -> int:
        """State and transient of one chunk stepped alone."""
        return self.of_layout[layout].state_nbytes + self.transient_nbytes([layout])

    def at_least(self, other: "OptimizerCost") -> "OptimizerCost":
        """The larger of both, layout by layout: for chunks that are split between two optimizers."""
        larger = {layout: StepCost(*map(max, astuple(cost), astuple(other.of_layout[layout]))) for layout, cost in self.of_layout.items()}
        return OptimizerCost(f"{self.name} + {other.name}", larger, max(self.overlap, other.overlap))


def optimizers_of(leaves: Iterable[nn.Parameter]) -> list[Optimizer]:
    """Live optimizers that hold at least one of `leaves`.

    torch keeps no list of them, so this asks the garbage collector. It runs when a plan is made, not at every step.
    """
    wanted = {id(leaf) for leaf in leaves}
    found = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and hasattr(o, "param_groups")]
    inner = {id(getattr(o, "optimizer", None)) for o in found}  # a wrapper (accelerate) forwards to the one it holds
    holders = [o for o in found if any(id(p) in wanted for group in o.param_groups for p in group["params"])]
    wrappers = [o for o in holders if isinstance(getattr(o, "optimizer", None), Optimizer) and id(o) not in inner]
    return [o for o in holders if o not in wrappers]


def step_only(optimizer: Optimizer) -> None:
    """The optimizer's own step without the hooks around it: those belong to the user's one call.

    A class whose `step` calls that of its base would run them there, so `is_stepping` says so meanwhile.
    """
    step: Any = type(optimizer).step
    while getattr(step, "hooked", False):  # `Optimizer.profile_hook_step` marks its wrapper so (torch 2.13.0)
        step = step.__wrapped__
    _stepping.append(optimizer)
    try:
        with torch.no_grad():
            step(optimizer)
    finally:
        _stepping.pop()


_stepping: list[Optimizer] = []


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether `step_only` is at work on `optimizer`."""
    return any(other is optimizer for other in _stepping)


def step_alone(optimizer: Optimizer, leaves: Iterable[nn.Parameter]) -> None:
    """`step_only` for `leaves`: gradients of its other parameters, also those that are no chunks, are out of sight meanwhile."""
    wanted = {id(leaf) for leaf in leaves}
    others = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and id(p) not in wanted]
    hidden = [parameter.grad for parameter in others]
    for parameter in others:
        parameter.grad = None
    try:
        step_only(optimizer)
    finally:
        for parameter, gradient in zip(others, hidden, strict=True):
            parameter.grad = gradient


def measure_optimizer(optimizer: Optimizer | None, layouts: Iterable[Layout], device: torch.device) -> OptimizerCost:
    """Step copies of `optimizer` (AdamW with defaults if None) and see what they allocate.

    State is read off a step of every layout. Transients and times are measured on the largest layout of each rank and dtype and
    scaled by elements; no chunk takes less time than one of 1024 elements. Raises `TypeError` for an optimizer that counts steps
    per parameter group or keeps state in other than plain tensors: chunks are stepped one group after the other, and such counters
    would run ahead.
    """
    distinct = set(layouts)
    largest: dict[tuple[bool, torch.dtype], Layout] = {}
    for layout in sorted(distinct, key=_numel):
        largest[_class(layout)] = layout
    dtype = next(iter(distinct))[1]
    vector, matrix = ((1024,), dtype), ((32, 32), dtype)
    trials: list[list[Layout]] = [*([layout] for layout in largest.values()), [vector], [vector, vector], [matrix], [matrix, matrix]]
    probes = [prepare(optimizer, trial, device) for trial in trials]
    calls = measure_calls([partial(step_only, p) for p in probes], device)
    del probes
    one, two, one_matrix, two_matrices = (call.peak_nbytes for call in calls[-4:])
    least_us = min(calls[-4].seconds, calls[-2].seconds) * 1e6
    of_class = dict(zip(largest, calls[:-4], strict=True))
    costs = {}
    for layout in distinct:
        state, counters = _state_nbytes(prepare(optimizer, [layout], device))
        call, whole = of_class[_class(layout)], _numel(largest[_class(layout)])
        scaled = -(-call.peak_nbytes * _numel(layout) // whole)
        us = math.ceil(max(least_us, call.seconds * 1e6 * _numel(layout) / whole))
        costs[layout] = StepCost(state, counters, scaled + (spare_nbytes(layout, state, device) if scaled else 0), us)
    name = type(optimizer).__name__ if optimizer is not None else "AdamW (assumed)"
    return OptimizerCost(name, costs, max(two / one if one else 1.0, two_matrices / one_matrix if one_matrix else 1.0))


def spare_nbytes(layout: Layout, state_nbytes: int, device: torch.device) -> int:
    """What scaling by elements misses: one-element temporaries, and the rows and columns of a factored optimizer."""
    scalars = _SCALARS_NBYTES if device.type == "cpu" else 8 * BLOCK_NBYTES
    factored = len(layout[0]) > 1 and 0 < state_nbytes < _numel(layout) * layout[1].itemsize
    return scalars + (2 * layout[1].itemsize * sum(layout[0]) if factored else 0)


def _class(layout: Layout) -> tuple[bool, torch.dtype]:
    """Layouts whose transients grow alike: factored optimizers treat matrices and vectors differently."""
    return len(layout[0]) > 1, layout[1]


def _numel(layout: Layout) -> int:
    return math.prod(layout[0])


def prepare(optimizer: Optimizer | None, layouts: Sequence[Layout], device: torch.device) -> Optimizer:
    """A copy of the optimizer over zeros of these layouts, with its state made by one step."""
    leaves = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype in layouts]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    probe = _like(optimizer, leaves)
    before = _numbers(probe)
    step_only(probe)
    if _numbers(probe) != before:
        raise TypeError(
            f"{type(probe).__name__} counts its steps per parameter group; chunks of a group are stepped at different times, "
            f"so its counter would be wrong. Way out: an optimizer that keeps its counters per parameter, as all of torch.optim do"
        )
    return probe


def _state_nbytes(probe: Optimizer) -> tuple[int, int]:
    """Bytes of state that can move, and of step counters."""
    tensors = [value for state in probe.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    odd = [type(tensor).__name__ for tensor in tensors if type(tensor) is not torch.Tensor]
    if odd:
        raise TypeError(f"{type(probe).__name__} keeps state in {odd[0]}; only plain tensors can be moved. Way out: torch.optim.AdamW")
    state = storage_nbytes(tensor for tensor in tensors if tensor.numel() > 1)
    return state, storage_nbytes(tensor for tensor in tensors if tensor.numel() <= 1)


def _like(optimizer: Optimizer | None, leaves: list[nn.Parameter]) -> Optimizer:
    """An optimizer with the same settings over other parameters, with no state."""
    if optimizer is None:
        return torch.optim.AdamW(leaves)
    probe = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__)
    probe.state = type(optimizer.state)(dict)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    probe.param_groups = [{**settings, "params": leaves}]
    return probe


def _numbers(optimizer: Optimizer) -> list[tuple[str, object]]:
    """The plain numbers of a group: where a step count would be kept."""
    return [(key, value) for key, value in optimizer.param_groups[0].items() if isinstance(value, numbers.Number)]
