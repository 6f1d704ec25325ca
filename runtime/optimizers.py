"""What the runtime must know of the user's optimizer: where it is, what it trains, and what a step of it costs in bytes and time."""

import functools
import gc
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import BLOCK_NBYTES, allocated_nbytes, storage_nbytes
from chunkft_compile.runtime.meter import CallCost, measure_calls
from chunkft_compile.runtime.state_tensors import Path, tensors_in

_TOGETHER = 3  # so many chunks are tried together
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

    `overlap` says what further chunks add when they are stepped together, over what one takes: the second, and each one after it.
    Both are 0 where the optimizer goes chunk by chunk, 1 where it takes all at once (foreach), and between them where some temporaries
    are of all chunks, or where those of one are still there while it is at the next.
    `tables` are tensors that it shares between the state of all chunks, by their place in it: they never move.
    """

    name: str
    of_layout: dict[Layout, StepCost]
    overlap: tuple[float, float]
    tables: Mapping[Path, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def table_nbytes(self) -> int:
        """Bytes of state that is there once for all chunks."""
        return storage_nbytes(self.tables.values())

    def transient_nbytes(self, layouts: Sequence[Layout]) -> int:
        """Bytes while stepping chunks of these layouts together, at most.

        Copies are there for all of them; then they are rounded one by one, in this order, and each copy of weights goes.
        """
        costs = [self.of_layout[layout] for layout in layouts]
        first, *others = sorted((cost.transient_nbytes for cost in costs), reverse=True)
        second, later = self.overlap
        step = math.ceil(first + second * sum(others[:1]) + later * sum(others[1:]))
        peak = step + sum(cost.weight_copy_nbytes + cost.gradient_copy_nbytes for cost in costs)
        left = 0
        for cost in reversed(costs):
            left += cost.weight_copy_nbytes
            peak = max(peak, left + cost.rounding_nbytes)
        return peak

    def us(self, layouts: Sequence[Layout]) -> int:
        """Microseconds of stepping chunks of these layouts: a chunk costs the same alone and among others."""
        return sum(self.of_layout[layout].us for layout in layouts)

    def alone_nbytes(self, layout: Layout) -> int:
        """State and transient of one chunk stepped alone."""
        return self.of_layout[layout].state_nbytes + self.transient_nbytes([layout])

    def together_nbytes(self, layout: Layout) -> int:
        """State and transient of a few such chunks stepped together."""
        return _TOGETHER * self.of_layout[layout].state_nbytes + self.transient_nbytes([layout] * _TOGETHER)

    def at_least(self, other: "OptimizerCost") -> "OptimizerCost":
        """The larger of both, layout by layout: for chunks of a layout that are split between two optimizers."""
        larger = {**self.of_layout, **other.of_layout}
        for layout in self.of_layout.keys() & other.of_layout.keys():
            a, b = self.of_layout[layout], other.of_layout[layout]
            larger[layout] = StepCost(*map(max, astuple(a), astuple(b)))
        name = self.name if self.name == other.name else f"{self.name} + {other.name}"
        second, later = (max(pair) for pair in zip(self.overlap, other.overlap, strict=True))
        return OptimizerCost(name, larger, (second, later), {**self.tables, **other.tables})


def live_optimizers() -> list[Optimizer]:
    """All optimizers of this process.

    torch keeps no list of them, so this asks the garbage collector. It runs when a plan is made, not at every step.
    """
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and hasattr(o, "param_groups")]


def optimizers_of(leaves: Iterable[nn.Parameter], among: Sequence[Optimizer] | None = None) -> list[Optimizer]:
    """Live optimizers, or of those `among` these, that hold at least one of `leaves`."""
    among = live_optimizers() if among is None else among
    wanted = {id(leaf) for leaf in leaves}
    inner = {id(getattr(o, "optimizer", None)) for o in among}  # a wrapper (accelerate) forwards to the one it holds
    holders = [o for o in among if any(id(p) in wanted for group in o.param_groups for p in group["params"])]
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
    """Step copies of `optimizer` (AdamW with defaults if None) and see what they allocate, with the dearest of its groups' settings.

    State is read off a step of every layout. Transients and times are measured on the largest layout of each class and scaled by
    elements; no chunk takes less time than one of 1024 elements. Raises `TypeError` for an optimizer that cannot step such chunks,
    counts steps per parameter group (chunks are stepped one group after the other, and such counters would run ahead) or keeps
    state that cannot be moved.
    """
    distinct = list(dict.fromkeys(layouts))
    costs = [_measure(variant, distinct, device) for variant in _variants(optimizer)]
    return functools.reduce(OptimizerCost.at_least, costs)


def _measure(optimizer: Optimizer | None, distinct: Sequence[Layout], device: torch.device) -> OptimizerCost:
    """What `measure_optimizer` says of an optimizer with one group."""
    state = {layout: _state(prepare(optimizer, [layout], device)) for layout in distinct}
    tables = _tables(optimizer, state, device)
    class_of = _classes(optimizer, state)
    largest = {class_of[layout]: layout for layout in sorted(distinct, key=_numel)}
    small = _trials(distinct)
    calls = _calls(optimizer, [*([layout] for layout in largest.values()), *small], device)
    tried = calls[-len(small) :]
    ones = tried[::_TOGETHER]
    added = [overlap(tried[i : i + _TOGETHER], device) for i in range(0, len(tried), _TOGETHER)]
    second, later = max(second for second, _ in added), max(later for _, later in added)
    least_us = min(one.seconds for one in ones) * 1e6
    of_class = dict(zip(largest, calls, strict=False))
    costs = {}
    for layout, kind in class_of.items():
        call, share = of_class[kind], _numel(layout) / _numel(largest[kind])
        moving = sum(held.nbytes for path, held in state[layout].items() if held.numel > 1 and path not in tables)
        counters = sum(held.nbytes for held in state[layout].values() if held.numel <= 1)
        transient = math.ceil(call.peak_nbytes * share)
        us = math.ceil(max(least_us, call.seconds * 1e6 * share))
        costs[layout] = StepCost(moving, counters, transient + (spare_nbytes(layout, moving, device) if transient else 0), us)
    name = type(optimizer).__name__ if optimizer is not None else "AdamW (assumed)"
    return OptimizerCost(name, costs, (second, later), tables)


def _trials(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """One, two and three small vectors, and as many small matrices: those of which there are any."""
    dtype = layouts[0][1]
    shapes: dict[bool, tuple[int, ...]] = {False: (1024,), True: (32, 32)}
    kinds = dict.fromkeys(len(shape) > 1 for shape, _ in layouts)
    return [[(shapes[kind], dtype)] * count for kind in kinds for count in range(1, _TOGETHER + 1)]


def _calls(optimizer: Optimizer | None, trials: Sequence[Sequence[Layout]], device: torch.device) -> list[CallCost]:
    probes = [prepare(optimizer, trial, device) for trial in trials]
    return measure_calls([partial(step_only, probe) for probe in probes], device)


def overlap(calls: Sequence[CallCost], device: torch.device) -> tuple[float, float]:
    """`OptimizerCost.overlap` from steps of one, two and three equal chunks.

    What does not grow with the chunk is left out: it would lower the ratios.
    """
    one, two, three = (call.peak_nbytes for call in calls)
    scalars = _scalars_nbytes(device)
    least = one - scalars
    if three <= scalars:
        return 0.0, 0.0
    if least <= 0:
        return 1.0, 1.0
    return max(0.0, (two - one) / least), max(0.0, (three - two) / least)


def _scalars_nbytes(device: torch.device) -> int:
    return _SCALARS_NBYTES if device.type == "cpu" else 8 * BLOCK_NBYTES


def spare_nbytes(layout: Layout, state_nbytes: int, device: torch.device) -> int:
    """What scaling by elements misses: one-element temporaries, and the rows and columns of a factored optimizer."""
    scalars = _scalars_nbytes(device)
    factored = len(layout[0]) > 1 and 0 < state_nbytes < _numel(layout) * layout[1].itemsize
    return scalars + (2 * layout[1].itemsize * sum(layout[0]) if factored else 0)


@dataclass(frozen=True)
class _Held:
    """A tensor of a chunk's state; `nbytes` is 0 where its storage is that of another one."""

    numel: int
    nbytes: int
    dtype: torch.dtype


_State = dict[Path, _Held]


def _classes(optimizer: Optimizer | None, state: Mapping[Layout, _State]) -> dict[Layout, object]:
    """Layouts whose transients grow alike. Factored optimizers treat matrices and vectors differently, 8-bit ones small tensors.

    Every layout is a class of its own where an optimizer multiplies matrices, or has a kernel made for each shape, as torchao does
    for its tensor subclasses: some of those need temporaries, others none.
    """
    nested = any(len(path) > 1 for held in state.values() for path in held)
    if nested or isinstance(optimizer, torch.optim.Muon):
        return {layout: layout for layout in state}
    return {layout: (len(layout[0]) > 1, layout[1], tuple((path, t.dtype) for path, t in held.items())) for layout, held in state.items()}


def _numel(layout: Layout) -> int:
    return math.prod(layout[0])


def prepare(optimizer: Optimizer | None, layouts: Sequence[Layout], device: torch.device) -> Optimizer:
    """A copy of the optimizer over zeros of these layouts, with its state made by one step. Raises `TypeError` if it cannot be made."""
    leaves = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype in layouts]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    probe = probe_of(optimizer, leaves)
    before = _numbers(probe)
    try:
        step_only(probe)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise TypeError(
            f"{type(probe).__name__} cannot step a chunk of shape {layouts[0][0]} and dtype {layouts[0][1]} on {device}: {error}. "
            f"Way out: other settings, or an optimizer for dense gradients such as torch.optim.AdamW"
        ) from error
    if _numbers(probe) != before:
        raise TypeError(
            f"{type(probe).__name__} counts its steps per parameter group; chunks of a group are stepped at different times, "
            f"so its counter would be wrong. Way out: an optimizer that keeps its counters per parameter, as all of torch.optim do"
        )
    return probe


def _state(probe: Optimizer) -> _State:
    """What the state of the first parameter is made of."""
    found: _State = {}
    seen: set[int] = set()
    for path, tensor in _tensors_of(probe, probe.param_groups[0]["params"][0]):
        storage = tensor.untyped_storage()._cdata
        found[path] = _Held(tensor.numel(), 0 if storage in seen else allocated_nbytes(tensor), tensor.dtype)
        seen.add(storage)
    return found


def _tensors_of(probe: Optimizer, leaf: nn.Parameter) -> list[tuple[Path, torch.Tensor]]:
    name = type(probe).__name__
    try:
        found = list(tensors_in(probe.state.get(leaf, {})))
    except TypeError as error:
        raise TypeError(f"{name}: {error}. Way out: torch.optim.AdamW") from error
    if any(getattr(tensor, "is_paged", False) for _, tensor in found):
        raise TypeError(
            f"{name} moves its state itself (paged memory). Way out: the same optimizer without paging; the plan moves its state"
        )
    return found


def _tables(optimizer: Optimizer | None, state: Mapping[Layout, _State], device: torch.device) -> dict[Path, torch.Tensor]:
    """State tensors that two parameters share, found on the smallest layout with each kind of state."""
    smallest = {tuple(state[layout]): layout for layout in sorted(state, key=_numel, reverse=True)}
    tables: dict[Path, torch.Tensor] = {}
    for layout in smallest.values():
        probe = prepare(optimizer, [layout, layout], device)
        first, second = (dict(_tensors_of(probe, leaf)) for leaf in probe.param_groups[0]["params"])
        tables |= {path: tensor for path, tensor in first.items() if second[path] is tensor}
    return tables


def _variants(optimizer: Optimizer | None) -> list[Optimizer | None]:
    """Copies of the optimizer for its groups, one for each kind of settings: which are there and which are zero, not how large they are."""
    if optimizer is None:
        return [None]
    kinds: dict[str, Optimizer | None] = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        kind = repr([(key, bool(value) if isinstance(value, numbers.Number) else value) for key, value in settings.items()])
        if kind not in kinds:
            kinds[kind] = probe_of(optimizer, [], group)
    return list(kinds.values())


def probe_of(optimizer: Optimizer | None, leaves: list[nn.Parameter], group: Mapping[str, Any] | None = None) -> Optimizer:
    """An optimizer with the settings of a group (the first one) over other parameters, with no state."""
    if optimizer is None:
        return torch.optim.AdamW(leaves)
    probe: Optimizer = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__)
    probe.state = type(optimizer.state)(dict)
    probe.param_groups = [{**(group or optimizer.param_groups[0]), "params": leaves}]
    return probe


def _numbers(optimizer: Optimizer) -> list[tuple[str, object]]:
    """The plain numbers of a group: where a step count would be kept."""
    return [(key, value) for key, value in optimizer.param_groups[0].items() if isinstance(value, numbers.Number)]
