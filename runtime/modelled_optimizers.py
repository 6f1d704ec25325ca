"""Optimizers by name, and what a step of one costs on a device that is not here.

Bytes are those of the real optimizer, stepped on small tensors on the CPU: state of every chunk follows exactly, because it is
a product of the chunk's dimensions, and what the step allocates grows with its elements. State of bitsandbytes is 8-bit for large
chunks only, in blocks of which the last may be short; the library makes it itself, as tensors without memory. Time is the traffic
of the kernels through the roofline of the device. No tensor of the size of a chunk is ever made.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from chunkft_compile.planner.devices import Device
from chunkft_compile.runtime.meter import measure_calls
from chunkft_compile.runtime.optimizers import Layout, OptimizerCost, StepCost, overlap, prepare, spare_nbytes, step_only
from chunkft_compile.runtime.state_tensors import Path

_CPU = torch.device("cpu")
_ELEMENTS = 2**18  # of a trial: enough that what does not grow with the elements is below a hundredth

_BLOCKWISE = 4096  # elements from which bitsandbytes keeps 8-bit state (`min_8bit_size`)
_QMAPS = ("qmap1", "qmap2")  # keys of the code books in the state of bitsandbytes

Factory = Callable[[Iterable[nn.Parameter], bool | None], Optimizer]


def _adamw(leaves: Iterable[nn.Parameter], foreach: bool | None) -> Optimizer:
    return torch.optim.AdamW(leaves, foreach=foreach)


def _adamw_fused(leaves: Iterable[nn.Parameter], _: bool | None) -> Optimizer:
    return torch.optim.AdamW(leaves, fused=True)


def _sgd(leaves: Iterable[nn.Parameter], foreach: bool | None) -> Optimizer:
    return torch.optim.SGD(leaves, lr=1e-3, foreach=foreach)


def _sgd_momentum(leaves: Iterable[nn.Parameter], foreach: bool | None) -> Optimizer:
    return torch.optim.SGD(leaves, lr=1e-3, momentum=0.9, foreach=foreach)


def _adafactor(leaves: Iterable[nn.Parameter], _: bool | None) -> Optimizer:
    return torch.optim.Adafactor(leaves)  # loops over parameters unless told otherwise, on CUDA too


def _adamw_8bit(leaves: Iterable[nn.Parameter], _: bool | None) -> Optimizer:
    try:
        library: Any = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(f"optimizer adamw-8bit needs bitsandbytes: pip install 'chunkft_compile[8bit]' ({error})") from error
    optimizer: Optimizer = library.optim.AdamW8bit(leaves)
    return optimizer


OPTIMIZERS: Mapping[str, Factory] = MappingProxyType(
    {
        "adamw": _adamw,
        "adamw-fused": _adamw_fused,
        "adamw-8bit": _adamw_8bit,
        "sgd": _sgd,
        "sgd-momentum": _sgd_momentum,
        "adafactor": _adafactor,
    }
)
"""Name -> maker of the optimizer from its parameters and `foreach` (None: as torch decides). torch 2.13 has no Lion."""


def make_optimizer(name: str, leaves: Iterable[nn.Parameter], *, foreach: bool | None = None) -> Optimizer:
    """The named optimizer with its defaults. Raises `ValueError` with the names there are, or with the package that it needs."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not known: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](leaves, foreach)


def model_optimizer(name: str, layouts: Iterable[Layout], device: Device) -> OptimizerCost:
    """What stepping chunks of these layouts with the named optimizer costs on `device`.

    On an accelerator torch takes all parameters at once (foreach) where the optimizer has no fused or looping default, and keeps
    step counters on the host unless the optimizer is fused. There bitsandbytes works in place (0.50.2: one kernel, no temporaries).
    """
    foreach = True if device.accelerator else None
    optimizer = make_optimizer(name, [nn.Parameter(torch.zeros(2))], foreach=foreach)
    counted = not device.accelerator or bool(optimizer.param_groups[0].get("fused"))

    def kind(layout: Layout) -> tuple[int, str, int]:
        small = name == "adamw-8bit" and math.prod(layout[0]) < _BLOCKWISE  # state is in full precision, and the step another one
        return len(layout[0]), str(layout[1]), _BLOCKWISE // 2 if small else _ELEMENTS

    distinct = sorted(set(layouts), key=lambda layout: (kind(layout), layout[0]))
    costs: dict[Layout, StepCost] = {}
    for (rank, _, elements), members in itertools.groupby(distinct, key=kind):
        group = list(members)
        trial = _try(name, foreach, rank, group[0][1], elements)
        for layout in group:
            state, counters = _blockwise_nbytes(name, layout, device) if name == "adamw-8bit" else _state_nbytes(trial, layout, device)
            costs[layout] = StepCost(
                state,
                counters if counted else 0,
                0 if name == "adamw-8bit" and device.accelerator else _transient_nbytes(trial, layout, state, device),
                _us(trial, layout, device),
            )
    tables = _tables(name) if name == "adamw-8bit" else {}
    return OptimizerCost(name, costs, _overlap(name, foreach, distinct[0][1]), tables)


def _blockwise_nbytes(name: str, layout: Layout, device: Device) -> tuple[int, int]:
    """State that bitsandbytes makes for a chunk and that can move; its step counters are no tensors. `init_state` is of 0.50.2."""
    optimizer: Any = make_optimizer(name, [nn.Parameter(torch.empty(layout[0], dtype=layout[1], device="meta"))])
    (group,) = optimizer.param_groups
    (leaf,) = group["params"]
    optimizer.init_state(group, leaf, 0, 0)
    own = [value for key, value in optimizer.state[leaf].items() if isinstance(value, torch.Tensor) and key not in _QMAPS]
    return sum(device.allocated_nbytes(value.untyped_storage().nbytes()) for value in own), 0


def _tables(name: str) -> dict[Path, torch.Tensor]:
    """The code books that bitsandbytes shares between all chunks."""
    optimizer: Any = make_optimizer(name, [nn.Parameter(torch.zeros(2))])
    return {(key,): table for key, table in zip(_QMAPS, optimizer.name2qmap.values(), strict=True)}


@dataclass(frozen=True)
class _Trial:
    """Steps on small tensors of one rank and dtype.

    `state[key]` are bytes of a state tensor at every corner of a box of shapes; `peak_nbytes`, `traffic_nbytes` and `launches` are
    those of one step on `elements`.
    """

    state: Mapping[str, Mapping[tuple[int, ...], int]]
    counters: int
    elements: int
    peak_nbytes: int
    traffic_nbytes: int
    launches: int

    @staticmethod
    def of(optimizer: Optimizer, rank: int, dtype: torch.dtype, elements: int) -> "_Trial":
        state: dict[str, dict[tuple[int, ...], int]] = {}
        counters = 0
        for corner in itertools.product(*([(4 + i, 8 + 2 * i) for i in range(rank)])):
            found: dict[str, Any] = next(iter(prepare(optimizer, [(corner, dtype)], _CPU).state.values()), {})  # plain SGD keeps nothing
            tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
            counters = sum(value.numel() <= 1 for value in tensors.values())
            for key, value in tensors.items():
                if value.numel() > 1 or rank == 0:
                    state.setdefault(key, {})[corner] = value.untyped_storage().nbytes()
        probe = prepare(optimizer, [(_shape(rank, elements), dtype)], _CPU)
        (call,) = measure_calls([partial(step_only, probe)], _CPU)
        with _Traffic() as traffic:
            step_only(probe)
        return _Trial(state, counters, elements, call.peak_nbytes, traffic.nbytes, traffic.launches)


def _shape(rank: int, elements: int) -> tuple[int, ...]:
    """A shape of so many elements (a power of two), as even as powers of two can be."""
    bits = elements.bit_length() - 1
    return tuple(2 ** (bits // rank + (i < bits % rank)) for i in range(rank))


def _state_nbytes(trial: _Trial, layout: Layout, device: Device) -> tuple[int, int]:
    """State that can move, and counters, as the device's allocator counts them."""
    moving = sum(device.allocated_nbytes(_at(corners, layout[0])) for corners in trial.state.values())
    return moving, trial.counters * device.allocated_nbytes(4)


def _at(corners: Mapping[tuple[int, ...], int], shape: Sequence[int]) -> int:
    """The multilinear function through the corners of a box, at `shape`: exact for sizes that are sums of products of dimensions."""
    total = Fraction(0)
    for corner, nbytes in corners.items():
        weight = Fraction(1)
        for i, size in enumerate(shape):
            (other,) = {c[i] for c in corners} - {corner[i]}
            weight *= Fraction(size - other, corner[i] - other)
        total += weight * nbytes
    assert total.denominator == 1, f"state of {shape} would be {total} bytes"
    return int(total)


def _transient_nbytes(trial: _Trial, layout: Layout, state_nbytes: int, device: Device) -> int:
    scaled = -(-trial.peak_nbytes * math.prod(layout[0]) // trial.elements)
    spare = spare_nbytes(layout, state_nbytes, torch.device("cuda" if device.accelerator else "cpu"))
    return device.allocated_nbytes(scaled) + spare if trial.peak_nbytes else 0


def _us(trial: _Trial, layout: Layout, device: Device) -> int:
    """All kernels of a step, one after the other: each is bound by the memory it touches."""
    nbytes = trial.traffic_nbytes * math.prod(layout[0]) / trial.elements
    return math.ceil(device.us(0, nbytes, "float32") + (trial.launches - 1) * device.launch_us)


@functools.cache  # bytes of torch's own code on small tensors: the same each time
def _try(name: str, foreach: bool | None, rank: int, dtype: torch.dtype, elements: int) -> _Trial:
    return _Trial.of(make_optimizer(name, [nn.Parameter(torch.zeros(2))], foreach=foreach), rank, dtype, elements)


@functools.cache
def _overlap(name: str, foreach: bool | None, dtype: torch.dtype) -> tuple[float, float]:
    """See `OptimizerCost.overlap`."""
    optimizer = make_optimizer(name, [nn.Parameter(torch.zeros(2))], foreach=foreach)
    matrix: Layout = ((512, 512), dtype)
    probes = [prepare(optimizer, [matrix] * count, _CPU) for count in (1, 2, 3)]
    return overlap(measure_calls([partial(step_only, probe) for probe in probes], _CPU), _CPU)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels and the bytes they read and write; tensors of one element are counters and cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        read, written = 0, 0
        values = [*args, *(kwargs or {}).values()]
        for argument, value in zip(func._schema.arguments, values, strict=False):
            nbytes = sum(t.numel() * t.element_size() for t in _large(value))
            read += nbytes
            written += nbytes if argument.alias_info is not None and argument.alias_info.is_write else 0
        written = written or sum(t.numel() * t.element_size() for t in _large(result))
        self.nbytes += read + written
        self.launches += read + written > 0
        return result


def _large(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.numel() > 1)
