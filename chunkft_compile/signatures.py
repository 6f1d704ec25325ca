"""Which compiled capture a call runs on: the one of its sizes, a larger one through its twin, or a new one.

NOTE [sizes that one plan serves]
The first batch of a family (same structure, dtypes, mode, autocast) is captured with its sizes. The second size makes a twin
(`twins.py`) with symbols for the dimensions that differ and for leading ones. From then on a batch no larger than a planned one, in any
dimension, runs the planned program with the twin's codes, and a larger one gets its capture from the twin, without tracing. Where the
twin is not right for a batch (its strides are of another kind, or the model branches on its length), its sizes are captured as the first
ones were. Dimensions of one element, and views into something larger, make a family of their own.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from chunkft_compile.assembly import Assembled
from chunkft_compile.autocasting import Autocast
from chunkft_compile.capture import Capture
from chunkft_compile.compiled import Compiled
from chunkft_compile.errors import CaptureError
from chunkft_compile.runtime.engine import Call
from chunkft_compile.segments import cut
from chunkft_compile.sizes import TILE, Sizes, Symbols
from chunkft_compile.solving import describe_inputs
from chunkft_compile.twins import Twin, is_same_graph

logger = logging.getLogger("chunkft_compile")

_SIGNATURES = 8  # compiled signatures kept; one holds a graph of some ten megabytes for a large model
_LEAST_LEADING = 37  # rows of a batch that a twin is traced with: enough for 32 tiles, and no size that models have

Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Shape and strides of every tensor of a batch."""


@dataclass(frozen=True)
class Counts:
    """What was done so far. `captures` and `symbolic_captures` trace the model; `derived` are captures made from a symbolic one.

    `plans` were solved or taken from a file, `codes` are the callables that segments were lowered to.
    """

    captures: int
    symbolic_captures: int
    derived: int
    plans: int
    codes: int


@dataclass(frozen=True, eq=False)
class Fit:
    """The compiled capture that a batch runs on; with a twin, it is larger than the batch, which has `sizes` where it has `planned`."""

    compiled: Compiled
    twin: Twin | None = None
    planned: Sizes | None = None
    sizes: Sizes | None = None

    def calls(self, assembled: Assembled) -> list[Call] | None:
        """What the instructions of a program call; None where the twin has no codes for this batch."""
        if self.twin is None or self.planned is None or self.sizes is None:
            return [code.call for code in assembled.codes]
        return self.twin.calls(assembled, self.planned, self.sizes)


class Maker(Protocol):
    """How captures are made and compiled."""

    @property
    def modes(self) -> tuple[bool, ...]:
        """Which modules are in training mode."""
        ...

    def capture(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
        """Trace with these sizes."""
        ...

    def capture_symbolic(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], named: Sequence[Sequence[object]], like: fx.Graph
    ) -> tuple[Capture, Symbols]:
        """Trace with symbols; see `capture.capture_symbolic`."""
        ...

    def compile(self, capture: Capture, batch: Sequence[torch.Tensor], inputs: tuple[str, ...]) -> Compiled:
        """Compile a capture for a batch of these (fake) tensors, described by `inputs`."""
        ...


@dataclass(eq=False)
class _Family:
    """Batches that differ in sizes only."""

    autocast: Autocast
    compiled: dict[Layout, Compiled] = field(default_factory=dict)
    batches: dict[Layout, list[torch.Tensor]] = field(default_factory=dict)  # fake
    twin: Twin | None = None
    served: dict[Layout, Sizes | None] = field(default_factory=dict)  # whether the twin runs these programs
    tried: set[frozenset[tuple[int, int]]] = field(default_factory=set)  # dimensions that were symbols
    alone: set[Layout] = field(default_factory=set)  # sizes that the twin has no codes for

    def drop(self, layout: Layout) -> int:
        """Forget what is compiled for these sizes; gives the number of codes that were."""
        self.served.pop(layout, None)
        self.batches.pop(layout)
        return self.compiled.pop(layout).codes


class Signatures:
    """Compiled captures of one model, the last used ones of all families. `maker` makes them."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self._families: dict[object, _Family] = {}
        self._used: OrderedDict[tuple[Hashable, Layout], None] = OrderedDict()
        self._mode = FakeTensorMode()
        self._codes = 0  # of what was dropped
        self._captures = self._symbolic_captures = self._derived = 0

    def counts(self, plans: int) -> Counts:
        """What was done so far, besides so many plans."""
        compiled = [found for family in self._families.values() for found in family.compiled.values()]
        twins = [family.twin.lowering for family in self._families.values() if family.twin is not None]
        codes = self._codes + sum(found.codes for found in compiled) + sum(len(twin.codes) for twin in twins)
        return Counts(self._captures, self._symbolic_captures, self._derived, plans, codes)

    def fit(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Fit:
        """What a batch runs on."""
        return self._find(args, kwargs, autocast, exact=False)

    def exact(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Compiled:
        """What is compiled for exactly the sizes of a batch."""
        return self._find(args, kwargs, autocast, exact=True).compiled

    def refuse(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> None:
        """From now on, batches of these sizes are not run through a twin."""
        _, family, _, layout = self._family(args, kwargs, autocast)
        logger.info("the symbolic graph has no code for sizes %s: they are captured on their own", [shape for shape, _ in layout])
        family.alone.add(layout)

    def _family(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast
    ) -> tuple[Hashable, _Family, list[torch.Tensor], Layout]:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        kinds = tuple(_kind(leaf) for leaf in leaves)
        whole = (str(spec), kinds, self._maker.modes, autocast)
        batch = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        layout = tuple((tuple(tensor.shape), tensor.stride()) for tensor in batch)
        return whole, self._families.setdefault(whole, _Family(autocast)), batch, layout

    def _find(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast, *, exact: bool) -> Fit:
        whole, family, batch, layout = self._family(args, kwargs, autocast)
        found: Fit | None = None
        if layout not in family.compiled and layout not in family.alone:
            found = self._through_twin(family, args, kwargs, batch, layout, exact=exact)
        if found is None and layout not in family.compiled:
            self._captures += 1
            with autocast.on():
                traced = self._maker.capture(args, kwargs)
            self._keep(family, batch, layout, self._maker.compile(traced, batch, describe_inputs(args, kwargs)))
        found = found or Fit(family.compiled[layout])
        for used, compiled in family.compiled.items():
            if compiled is found.compiled:
                self._used[whole, used] = None
                self._used.move_to_end((whole, used))
        self._forget()
        return found

    def _forget(self) -> None:
        """Drop what was used longest ago, and families of which nothing is left."""
        while len(self._used) > _SIGNATURES:
            (name, layout), _ = self._used.popitem(last=False)
            if name in self._families and layout in self._families[name].compiled:
                self._codes += self._families[name].drop(layout)
        for name, family in list(self._families.items()):
            if not family.compiled:
                self._codes += len(family.twin.lowering.codes) if family.twin is not None else 0
                del self._families[name]
        for name, layout in list(self._used):
            if name not in self._families or layout not in self._families[name].compiled:
                del self._used[name, layout]

    def _keep(self, family: _Family, batch: Sequence[torch.Tensor], layout: Layout, compiled: Compiled) -> None:
        with self._mode:
            fakes = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) for one in batch]
        family.batches[layout], family.compiled[layout] = fakes, compiled

    def _through_twin(
        self,
        family: _Family,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batch: Sequence[torch.Tensor],
        layout: Layout,
        *,
        exact: bool,
    ) -> Fit | None:
        """A planned program that is large enough, or else what the twin makes for these sizes."""
        sizes = family.twin.sizes(batch) if family.twin is not None else None
        if sizes is None:
            sizes = self._make_twin(family, args, kwargs, batch, layout)
        if sizes is None or family.twin is None:
            return None
        if not exact:
            for other in self._latest_first(family):
                if _covers(other, layout) and (planned := self._served(family, other)) is not None:
                    return Fit(family.compiled[other], family.twin, planned, sizes)
        compiled = self._derive(family.twin, sizes, batch, describe_inputs(args, kwargs))
        if exact:
            return Fit(compiled)
        for other in [other for other in family.compiled if _covers(layout, other) and self._served(family, other) is not None]:
            self._codes += family.drop(other)
        self._keep(family, batch, layout, compiled)
        family.served[layout] = sizes
        return Fit(compiled)

    def _derive(self, twin: Twin, sizes: Sizes, batch: Sequence[torch.Tensor], inputs: tuple[str, ...]) -> Compiled:
        self._derived += 1
        return self._maker.compile(twin.at(sizes), batch, inputs)

    def _latest_first(self, family: _Family) -> list[Layout]:
        mine = [layout for name, layout in reversed(self._used) if self._families[name] is family and layout in family.compiled]
        return mine + [layout for layout in family.compiled if layout not in mine]

    def _served(self, family: _Family, layout: Layout) -> Sizes | None:
        """The sizes of a compiled capture whose graph the twin has, too."""
        if layout not in family.served:
            twin, compiled = family.twin, family.compiled[layout]
            assert twin is not None, "there is a twin by now"
            sizes = twin.sizes(family.batches[layout])
            if sizes is not None:
                found = twin.at(sizes)
                if not is_same_graph(compiled.capture, found, compiled.segments, cut(found)):
                    logger.info("with symbolic sizes, the graph is another one: programs are made from that now")
                    self._codes += compiled.codes
                    self._derived += 1
                    family.compiled[layout] = self._maker.compile(found, family.batches[layout], compiled.inputs)
            family.served[layout] = sizes
        return family.served[layout]

    def _make_twin(
        self, family: _Family, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Sequence[torch.Tensor], layout: Layout
    ) -> Sizes | None:
        """Trace with symbols where this batch differs from the last one; gives its sizes, or None where that does not work."""
        partner = next(iter(self._latest_first(family)), None)
        if partner is None:
            return None
        shapes = [(old, new) for (old, _), (new, _) in zip(partner, layout, strict=True)]
        changed = {(i, dim) for i, (old, new) in enumerate(shapes) for dim in range(len(old)) if old[dim] != new[dim]}
        changed = changed.union(*family.tried)
        if not changed or frozenset(changed) in family.tried:
            return None
        family.tried.add(frozenset(changed))
        leading = {(i, 0) for i, (_, new) in enumerate(shapes) if new and new[0] > 1}
        like = family.compiled[partner].capture
        taken = {size for node in (*like.params, *like.buffers) for size in node.meta["val"].shape}
        taken |= {size for pair in shapes for shape in pair for size in shape}
        for symbolic, usual in ((changed | leading, False), (changed, True)):
            named = [
                [pair if (i, dim) in symbolic else None for dim, pair in enumerate(zip(*both, strict=True))]
                for i, both in enumerate(shapes)
            ]
            sizes = _usual(named) if usual else _unlike(named, taken)
            example = [_example(one, names, sizes) for one, names in zip(batch, named, strict=True)]
            with family.autocast.on():
                twin = self._trace(args, kwargs, example, named, like.graph)
            found = twin.sizes(batch) if twin is not None else None
            if twin is not None and found is not None and twin.sizes(family.batches[partner]) is not None:
                self._codes += len(family.twin.lowering.codes) if family.twin is not None else 0
                family.twin, family.served = twin, {}
                return found
        logger.info("sizes of the batch cannot be symbols: each is captured on its own")
        return None

    def _trace(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        example: Sequence[torch.Tensor],
        named: Sequence[Sequence[object]],
        like: fx.Graph,
    ) -> Twin | None:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        tensors = iter(example)
        leaves = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(leaves, spec)
        self._symbolic_captures += 1
        try:
            return Twin(*self._maker.capture_symbolic(own_args, own_kwargs, named, like))
        except (CaptureError, ValueError, RuntimeError, IndexError) as error:
            logger.debug("no symbolic capture: %s", error)
            return None


def _kind(leaf: Any) -> Hashable:
    """What captures of one family share. Torch takes sizes of 0 and 1 for numbers even where others are symbols."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return tuple(min(size, 2) for size in leaf.shape), leaf.dtype, leaf.is_contiguous()


def _covers(large: Layout, small: Layout) -> bool:
    return all(a >= b for (one, _), (other, _) in zip(large, small, strict=True) for a, b in zip(one, other, strict=True))


def _usual(named: Sequence[Sequence[Any]]) -> dict[object, int]:
    """The larger of both sizes for every name."""
    return {name: max(name) for names in named for name in names if name is not None}


def _unlike(named: Sequence[Sequence[Any]], taken: set[int]) -> dict[object, int]:
    """For every name a size that is no other size of the model: what tracing decides by it then holds for many.

    Rows of a batch may be more than there were; other dimensions may have a limit, so theirs are smaller if possible. Where rows are
    no symbol, there may be as many tokens only as the length says, and tiles must have fewer.
    """
    found: dict[object, int] = {}
    inner = {name for names in named for name in names[1:]}
    above = 4 if any(names and names[0] is not None for names in named) else TILE
    for name in dict.fromkeys(name for names in named for name in names if name is not None):
        least = _LEAST_LEADING if name not in inner else max(name) + 1
        below = range(max(name), above, -1) if name in inner else range(0)
        candidates = (size for sizes in (below, range(max(least, above + 1), least + 10_000)) for size in sizes)
        found[name] = next(size for size in candidates if _is_prime(size) and size not in taken and size not in found.values())
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def _example(tensor: torch.Tensor, names: Sequence[object], sizes: Mapping[object, int]) -> torch.Tensor:
    """Zeros in place of a tensor of the batch, with other sizes."""
    shape = [size if name is None else sizes[name] for size, name in zip(tensor.shape, names, strict=True)]
    if tensor.is_contiguous():
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()
