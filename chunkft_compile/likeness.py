"""The proof that a deep model is a shallow one with a block repeated: both are run on fake tensors, and every operator call is compared.

NOTE [what is compared]
The rows of a run are its calls in order: operator, arguments, results, whether autograd records it and as what. Arguments that are tensors
are written by where they come from as seen from the block: the same block, the one before, what stands before all blocks, or a weight by
its name inside the block. So two blocks have equal rows just where they do the same with weights of their own and the result of their
predecessor, and not where one does something else: a window of its own, a scale by depth, a jump over two blocks, a weight of another.
What the model does outside of its blocks, and its outputs, must be the same in both runs. Then tracing the deep model would give the graph
of the shallow one with its middle block repeated, for tracing sees these calls and no others: code that asks whether it is being traced is
told so in these runs, too. Where anything is in doubt, there is no proof.

NOTE [what need not be asked]
Most of the time of a run is what fake tensors take to find the layout of a result, and that follows from the operator and the layouts
of its arguments. So where a block calls what the one before has called, with arguments from the same places, and the results of the two
blocks before are laid out alike, the result is made as it was there: in a storage of its own, or as a view of the same argument.
"""

import contextlib
import copy
import functools
import gc
import logging
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

# Private (2.13.0): there is no public way to see the operators that a model calls.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from chunkft_compile import fakes
from chunkft_compile.fakes import PLAIN, Made, how_made, tensors_of
from chunkft_compile.stacks import Stack

logger = logging.getLogger(__name__)

_DEVICE = torch.ops.prim.device.default
_WITH = 4  # entries of a row that say what is called with what; those behind are about its results

FEW, MORE = 4, 5
"""Blocks that are traced where all are equal: the first (next to what stands before), two that show how one follows another, the last.

If blocks read a trained value in common, its gradients are summed up along them; the sum begins in the last but one, which then differs.
"""

_SMALL = 16  # elements of a constant that is compared by value


class _Doubt(Exception):
    """There is no proof, and why."""


@dataclass(frozen=True)
class _Place:
    """Result `item` of call `row` of part `part`: 0 is before the blocks, 1 the first block."""

    part: int
    row: int
    item: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the calls of a run of `depth` blocks. `named` are tensors that are there before, by where they come from."""

    def __init__(self, depth: int, fake_mode: FakeTensorMode, named: Mapping[int, tuple[int | None, object]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake_mode = fake_mode
        self.parts: list[list[list[object]]] = [[] for _ in range(depth + 2)]  # before the blocks, each block, behind them
        self.tensors: list[torch.Tensor] = []
        self.have_common = False  # whether blocks read a trained value that none of them made
        self._depth = depth
        self._part = 0
        self._inside = False
        self._named = named
        self._places: dict[int, _Place] = {}
        self._results: list[tuple[list[object], torch.Tensor]] = []
        self._made: dict[tuple[int, int], Made] = {}  # by part and row
        self._follows = False  # whether the block that runs does what the one before has done, so far

    def enter(self, block: int) -> None:
        """A block begins."""
        if self._inside or block != self._part:
            raise _Doubt(f"block {block} runs where block {self._part} should")
        self._inside, self._part = True, block + 1
        self._follows = block > 1 and _layouts(self.parts[block]) == _layouts(self.parts[block - 1])

    def leave(self, block: int) -> None:
        """It ends."""
        if not self._inside or block + 1 != self._part:
            raise _Doubt(f"block {block} ends out of order")
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as for the device: what follows from the answer is compared
            return args[0].fake_device if func is _DEVICE and isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        if not self._inside and 0 < self._part <= self._depth:
            if self._part < self._depth:
                raise _Doubt(f"{func} is called between block {self._part - 1} and the next")
            self._part += 1
        row: list[object] = [str(func), torch.is_grad_enabled(), self._written(args), self._written(sorted(kwargs.items()))]
        rows = self.parts[self._part]
        result = self._call(func, args, kwargs, row)
        for item, leaf in enumerate([result] if isinstance(result, torch.Tensor) else pytree.tree_leaves(result)):
            if not isinstance(leaf, torch.Tensor):
                row.append(self._written(leaf))
                continue
            self._places[id(leaf)] = _Place(self._part, len(rows), item)
            self.tensors.append(leaf)
            self._results.append((row, leaf))
            row.append(_layout(leaf))
        rows.append(row)
        self._follows = self._follows and row == self.parts[self._part - 1][len(rows) - 1]
        return result

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], row: list[object]) -> Any:
        """What a call gives, see NOTE [what need not be asked]. `row` says what is called with what."""
        part, number = self._part, len(self.parts[self._part])
        before = self.parts[part - 1]
        if self._follows:
            self._follows = self._inside and number < len(before) and before[number][:_WITH] == row
        if self._follows and (made := self._made.get((part - 1, number))) is not None:
            self._made[part, number] = made
            return made.again(self._fake_mode, tensors_of(args))
        result = fakes.call(func, args, kwargs, self._fake_mode, lambda: func(*args, **kwargs))
        if self._inside and (found := how_made(func, args, kwargs, result)) is not None:
            self._made[part, number] = found
        return result

    def finish(self, outputs: Any) -> object:
        """The outputs as seen from behind the blocks. Writes what autograd recorded of each call."""
        if self._inside or self._part < self._depth:
            raise _Doubt(f"only {self._part} of {self._depth} blocks are called as modules")
        self._part = self._depth + 1
        for row, tensor in self._results:
            made: Any = tensor.grad_fn
            kind = type(made)  # of Python, but for those that `torch.library` makes: they are the same wherever their operator is called
            own = issubclass(kind, torch.autograd.function.BackwardCFunction) and not kind.__name__.startswith("GeneratedBackwardFor_")
            if own or tensor._backward_hooks:
                raise _Doubt(f"{made or 'a tensor'} has a backward of its own")
            row.append((tensor.requires_grad, kind.__name__))
        leaves, spec = pytree.tree_flatten(outputs)
        return self._written(leaves), str(spec)

    def _written(self, value: Any) -> object:
        """An argument as it is compared."""
        if isinstance(value, torch.Tensor):
            return self._origin(value)
        if isinstance(value, list | tuple):
            return tuple([self._written(each) for each in value])
        if isinstance(value, PLAIN):
            return type(value), value
        raise _Doubt(f"an argument is a {type(value).__name__}")

    def _origin(self, tensor: torch.Tensor) -> object:
        origin = self._found(tensor)
        if self._part > 1 and self._inside and origin[0] in ("before all", "shared") and tensor.requires_grad:
            self.have_common = True
        return origin

    def _found(self, tensor: torch.Tensor) -> tuple[object, ...]:
        if (place := self._places.get(id(tensor))) is not None:
            return self._seen(place)
        if (named := self._named.get(id(tensor))) is not None:
            block, name = named
            if block is not None and block + 1 != self._part:
                raise _Doubt(f"{name} of block {block} is used outside of it")
            return ("own" if block is not None else "shared"), name
        if isinstance(tensor, FakeTensor):
            raise _Doubt("a tensor comes from nowhere")
        self.tensors.append(tensor)
        if tensor.numel() <= _SMALL and tensor.device.type == "cpu":
            with _disable_current_modes():
                return "value", _layout(tensor), str(tensor.tolist())
        return "constant", id(tensor)

    def _seen(self, place: _Place) -> tuple[object, ...]:
        """Where a result comes from, as seen from the part that is running."""
        if place.part == 0:
            where = "before all"
        elif place.part == self._part:
            where = "here"
        elif place.part == self._part - 1:
            where = "before"
        else:
            raise _Doubt(f"a result of block {place.part - 1} is used beyond the next one")
        return where, place.row, place.item


def _layouts(rows: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    return [row[_WITH:] for row in rows]


def _layout(tensor: torch.Tensor) -> object:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def blocks_to_trace(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], stack: Stack, batch: Sequence[torch.Tensor]) -> int | str:
    """How many blocks of `wrap(model)`, called with `batch`, say what all of them do; or why that is not proven.

    Neither the model nor its batch change, and nothing is computed.
    """
    state = random.getstate()
    try:
        deep = _record(model, wrap, stack, batch, stack.depth)
        kept = MORE if deep.have_common else FEW
        before, first, *middle, behind = deep.parts
        for block, part in enumerate(middle, 1):
            if part != middle[0]:
                return f"block {block} does not do the same as block 1"
        shallow = _record(model, wrap, stack, batch, kept)
        if random.getstate() != state:
            return "forward draws random numbers in Python"
    except _Doubt as doubt:
        return str(doubt)
    finally:
        random.setstate(state)
    same = shallow.parts == [before, first, *middle[: kept - 1], behind] and shallow.outputs == deep.outputs
    return kept if same else "what stands around the blocks depends on their number"


@dataclass(frozen=True)
class _Run:
    """What was recorded: the calls before the blocks, of each block and behind them, and the outputs."""

    parts: list[list[list[object]]]
    outputs: object
    have_common: bool


def _record(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], stack: Stack, batch: Sequence[torch.Tensor], depth: int) -> _Run:
    """A run with the first `depth` blocks."""
    made = list[weakref.ref[torch.Tensor]]()
    doubt = ""
    try:
        return _run(model, wrap, stack, batch, depth, made)
    except Exception as error:  # whatever the model raises on fake tensors: tracing it will tell. Its traceback must not keep them
        doubt = str(error) if isinstance(error, _Doubt) else f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        _give_back(made)
    raise _Doubt(doubt)


def _run(
    model: nn.Module,
    wrap: Callable[[nn.Module], nn.Module],
    stack: Stack,
    batch: Sequence[torch.Tensor],
    depth: int,
    made: list["weakref.ref[torch.Tensor]"],
) -> _Run:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_of = {id(tensor): _fake(mode, tensor) for tensor in (*model.parameters(), *model.buffers())}
    inputs = [_fake(mode, tensor) for tensor in batch]
    named = {id(fake_of[id(tensor)]): stack.block_of(name) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    recorder = _Recorder(depth, mode, named | {id(tensor): (None, str(position)) for position, tensor in enumerate(inputs)})
    copied = _copied(model, stack, depth, fake_of)
    for block, module in enumerate(copied.get_submodule(stack.path).children()):
        _watch(module, recorder, block)
    try:
        with _as_if_traced(), mode, recorder:
            outputs = wrap(copied)(*inputs)
        found = recorder.finish(outputs)
    finally:
        made += [weakref.ref(tensor) for tensor in recorder.tensors if isinstance(tensor, FakeTensor)]
    return _Run(recorder.parts, found, recorder.have_common)


def _copied(model: nn.Module, stack: Stack, depth: int, fake_of: Mapping[int, torch.Tensor]) -> nn.Module:
    """A copy of the model with its first blocks, over fake weights. What forward does to it, it does not do to the model."""
    memo: dict[int, Any] = dict(fake_of)
    for module in model.modules():  # other tensors stay: they may be large, and are compared by what they are
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)}
    memo |= {id(block): nn.Identity() for block in list(stack.blocks.children())[depth:]}
    copied: nn.Module = copy.deepcopy(model, memo)
    modules = copied.get_submodule(stack.path)._modules
    for name in list(modules)[depth:]:
        del modules[name]
    return copied


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    fake = Made.like(tensor)._replace(offset=0).again(mode, [])
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake.requires_grad_(tensor.requires_grad)


def _watch(module: nn.Module, recorder: _Recorder, block: int) -> None:
    module.register_forward_pre_hook(lambda *_: recorder.enter(block), prepend=True)
    module.register_forward_hook(lambda *_: recorder.leave(block))


@contextlib.contextmanager
def _as_if_traced() -> Iterator[None]:
    """Gradients are on, and autocast keeps no casts. What torch and the model complain of, they will complain of when they are traced."""
    cached, complaints, flag = torch.is_autocast_cache_enabled(), logging.getLogger("torch._subclasses.fake_tensor"), torch.compiler
    torch.set_autocast_cache_enabled(False)
    before = complaints.disabled, flag._is_compiling_flag
    complaints.disabled = flag._is_compiling_flag = True  # private (2.13.0): what `torch.compiler.is_compiling()` says
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        complaints.disabled, flag._is_compiling_flag = before


def _give_back(made: Sequence["weakref.ref[torch.Tensor]"]) -> None:
    """Fake tensors that forward has put into a cache outside of the model are taken out of it: the next real call would find them."""
    if not any(ref() is not None for ref in made):
        return
    gc.collect()
    found: list[Any] = [tensor for ref in made if (tensor := ref()) is not None]
    known = {id(tensor) for tensor in found}
    for _ in range(3):  # a tensor may be in a tuple, in a cache
        found = [one for one in gc.get_referrers(*found) if isinstance(one, tuple | dict | functools._lru_cache_wrapper)]
        for holder in found:
            if isinstance(holder, functools._lru_cache_wrapper):
                holder.cache_clear()
            elif isinstance(holder, dict) and "__name__" not in holder:
                for key in [key for key, value in holder.items() if _holds(value, known)]:
                    del holder[key]
    del found
    if left := sum(ref() is not None for ref in made):
        logger.warning("forward keeps %d tensors outside of the model, which are fake now: clear its caches before evaluating", left)


def _holds(value: object, known: set[int]) -> bool:
    return id(value) in known or (isinstance(value, tuple) and any(id(each) in known for each in value))
