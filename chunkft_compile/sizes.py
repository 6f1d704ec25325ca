"""Sizes that are expressions: how they come into a graph, how they leave it as arguments of a code, and what they are for one batch.

NOTE [sizes of a symbolic graph]
A graph with symbolic sizes has `torch.SymInt` in the shapes of its values and in the arguments of its calls, never as a node. Rules
that compute with shapes therefore need not know of them. A comparison that no expression decides is decided by the sizes that the graph
was traced with, and the shape environment notes it as a *guard*: the graph is right for the sizes for which all guards hold.
Everything that knows how torch represents this is in this file; checked on torch 2.13.0.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

# Private (2.13.0): a source for symbols that stand in no input.
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

aten = torch.ops.aten

Expression: TypeAlias = Any
"""A sympy expression."""
_SIZE = "chunkft_size"
"""Key in the meta of an input of a code: the expression it holds at run time."""
TILE, _REST = 13, 11
"""Tokens of a tile and of the last tile where codes are lowered: no sizes that models have, and fewer than all tokens."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NUMBERS = (*_SYMBOLIC, int, float)


@dataclass(frozen=True)
class Place:
    """Where a symbol stands in a batch: dimension `dim` of tensor `tensor`, its size or its stride."""

    tensor: int
    dim: int
    stride: bool = False


@dataclass
class Symbols:
    """The symbols of a batch, by where they stand."""

    places: dict[sympy.Symbol, Place] = field(default_factory=dict)

    def read(self, batch: Sequence[torch.Tensor]) -> "Sizes":
        """Their values in a batch of as many tensors of as many dimensions."""
        found = {}
        for symbol, place in self.places.items():
            tensor = batch[place.tensor]
            found[symbol] = int(tensor.stride(place.dim) if place.stride else tensor.shape[place.dim])
        return Sizes(found)


class Sizes:
    """A number for every symbol."""

    def __init__(self, values: Mapping[sympy.Symbol, int]) -> None:
        self.key = tuple(sorted((symbol.name, value) for symbol, value in values.items()))
        self._values = {symbol: sympy.Integer(value) for symbol, value in values.items()}
        self._known: dict[Expression, int | float | bool] = {}

    def __contains__(self, symbol: sympy.Symbol) -> bool:
        return symbol in self._values

    def also(self, values: Mapping[sympy.Symbol, int]) -> "Sizes":
        """These, and more."""
        return Sizes({symbol: int(value) for symbol, value in self._values.items()} | dict(values))

    def __getitem__(self, expression: Expression) -> int | float | bool:
        """What an expression is. Raises `ValueError` where it is no number for these sizes."""
        if expression not in self._known:
            self._known[expression] = _number(expression.xreplace(self._values))
        return self._known[expression]

    def of(self, value: Any) -> Any:
        """`value` with numbers for symbolic ones in it, however deep in lists and tuples; other values stay."""
        return fx.node.map_aggregate(value, lambda leaf: self[expression_of(leaf)] if isinstance(leaf, _SYMBOLIC) else leaf)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The shape of a symbolic tensor."""
        return tuple(int(self.of(size)) for size in tensor.shape)

    def stride(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The strides of a symbolic tensor."""
        return tuple(int(self.of(size)) for size in tensor.stride())


class SymbolicTiles:
    """Tiles for codes with symbolic sizes: how long they are and where they begin is only known at run time.

    Their lengths are symbols of their own, and lowering takes every tile for the first one: else the guards of a code with many tiles
    would speak of the tokens of the whole batch, and hold for no small one.
    """

    def __init__(self, environment: ShapeEnv) -> None:
        self._tile, self._rest = (_new_symbol(environment, name, hint) for name, hint in (("tile", TILE), ("rest", _REST)))

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """Their symbols."""
        return expression_of(self._tile), expression_of(self._rest)

    def ranges(self, graph: fx.Graph, count: int) -> list[tuple[int | fx.Node, Any]]:
        """Start and length of each of `count` tiles; the starts are new inputs of the graph."""
        first = next((node for node in graph.nodes if node.op != "placeholder"), None)
        starts: list[int | fx.Node] = [0]
        with graph.inserting_before(first) if first is not None else contextlib.nullcontext():
            for number in range(1, count):
                node = graph.placeholder(f"tile{number}")
                node.meta |= {"val": 0, _SIZE: number * expression_of(self._tile)}
                starts.append(node)
        return [(start, self._tile if number < count - 1 else self._rest) for number, start in enumerate(starts)]

    def sizes(self, sizes: "Sizes", length: int, rest: int) -> "Sizes":
        """`sizes` with those of the tiles."""
        return sizes.also(dict(zip(self.symbols, (length, rest), strict=True)))


def _new_symbol(environment: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    source = ConstantSource(f"chunkft_{name}")
    symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC)
    return environment.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]


class Guards:
    """What must hold of sizes for a graph to be right for them; grows while rules compute with its shapes."""

    def __init__(self, environment: ShapeEnv) -> None:
        self._environment = environment
        self._checked: dict[object, int] = {}  # sizes -> guards that hold for them

    def hold(self, sizes: Sizes) -> bool:
        """Whether all guards hold that there are by now."""
        guards = self._environment.guards
        first = self._checked.get(sizes.key)
        if first is None and not all(_holds(claim, sizes) for claim in self._claims(sizes)):
            return False
        if not all(_holds(guard.expr, sizes) for guard in guards[first or 0 :]):
            return False
        self._checked[sizes.key] = len(guards)
        return True

    def _claims(self, sizes: Sizes) -> Iterator[Expression]:
        """What tracing took for granted of each symbol: its range, and what it is equal to.

        A symbol that is not of the batch is of no concern as long as no guard and no size mentions it.
        """
        for symbol, found in self._environment.var_to_range.items():
            if symbol in sizes:
                yield sympy.Ge(symbol, found.lower)
                yield sympy.Le(symbol, found.upper)
        for symbol, other in self._environment.replacements.items():
            yield sympy.Eq(symbol, other)


def _holds(claim: Expression, sizes: Sizes) -> bool:
    try:
        return bool(sizes[claim])
    except ValueError:
        return False


def _number(expression: Expression) -> int | float | bool:
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if not getattr(expression, "is_number", False):
        raise ValueError(f"{expression} does not follow from the sizes of the batch")
    return int(expression) if expression.is_integer else float(expression)


def expression_of(value: Any) -> Expression:
    """The expression behind a symbolic number."""
    found: Expression = value.node.expr
    return found


def is_symbolic(value: Any) -> bool:
    """Whether a number, or a size of a tensor, is symbolic."""
    sizes = [*value.shape] if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, _SYMBOLIC) for size in sizes)


def depends_on_data(value: Any) -> bool:
    """Whether a symbolic number, or a size of a tensor, is known only once the batch's values are."""
    sizes = [*value.shape] if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, _SYMBOLIC) and bool(free_unbacked_symbols(size)) for size in sizes)


def symbolic_inputs(
    traced: fx.GraphModule, tensors: Sequence[torch.Tensor], named: Sequence[Sequence[object]]
) -> tuple[tuple[torch.Tensor, ...], Symbols]:
    """Fake tensors like `tensors` with the symbols that Dynamo gave them, those of a name all with the first one's."""
    sources: dict[int, torch.Tensor] = {}
    for node in traced.graph.find_nodes(op="placeholder"):
        # Private (2.13.0): where Dynamo found this input; `tensors[i]` of the template's forward.
        source = getattr(node, "_dynamo_source", None)
        if source is not None and getattr(getattr(source, "base", None), "local_name", None) == "tensors":
            sources[source.index] = node.meta["val"]
    symbols, first = Symbols(), dict[object, Any]()
    found: Any
    for number, value in sorted(sources.items()):
        for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
            if named[number][dim] is not None:
                first.setdefault(named[number][dim], size)
            for found, is_stride in ((size, False), (stride, True)):
                # Private (2.13.0): `expr` puts for a symbol what it turned out to be equal to; this is the one made for the dimension.
                if is_symbolic(found) and isinstance(symbol := found.node._expr, sympy.Symbol):
                    symbols.places.setdefault(symbol, Place(number, dim, is_stride))
    fakes = []
    for number, tensor in enumerate(tensors):
        value = sources.get(number, tensor)
        shape = [size if name is None else first.get(name, size) for size, name in zip(value.shape, named[number], strict=True)]
        with traced.meta["fake_mode"]:
            fakes.append(torch.empty_strided(shape, _strides(tensor, value, shape), dtype=tensor.dtype, device=tensor.device))
    return tuple(fakes), symbols


def _strides(tensor: torch.Tensor, value: torch.Tensor, shape: Sequence[Any]) -> list[Any]:
    """Those of a contiguous tensor follow from its shape."""
    if not tensor.is_contiguous():
        return list(value.stride())
    found: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        found.insert(0, step)
        step = step * size
    return found


def fold_sizes(graph: fx.Graph, like: fx.Graph) -> None:
    """Make sizes arguments, see NOTE [sizes of a symbolic graph], and leave out what only symbolic tracing writes.

    That is slices of a whole dimension, which are not there where sizes are numbers; a few are `alias` there, as `like` shows.
    """
    numbers: dict[fx.Node, Any] = {}
    expected = [node.target for node in like.nodes if node.op == "call_function"]
    place = 0
    for node in list(graph.nodes):
        node.args = fx.node.map_arg(node.args, lambda source: numbers.get(source, source))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda source: numbers.get(source, source))
        if node.op != "call_function":
            continue
        if isinstance(node.meta.get("val"), _NUMBERS):
            numbers[node] = node.meta["val"]
        elif not _is_whole(node):
            place += 1
        elif node.target is aten.slice.Tensor and expected[place : place + 1] == [aten.alias.default]:
            node.target, node.args, node.kwargs = aten.alias.default, node.args[:1], {}
            place += 1
        else:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(numbers):
        graph.erase_node(node)


def _is_whole(node: fx.Node) -> bool:
    """Whether a call cuts nothing off: a slice of all there is, or the backward of one."""
    if node.target not in (aten.slice.Tensor, aten.slice_backward.default):
        return False
    old, new = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    expressions = [[_plain(size) for size in value.shape] for value in (old, new)]
    return expressions[0] == expressions[1]


def _plain(size: Any) -> Any:
    return expression_of(size) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def symbols_in(graph: fx.Graph) -> set[sympy.Symbol]:
    """The symbols in the arguments and in the values of its calls."""
    found: set[sympy.Symbol] = set()

    def look(leaf: Any) -> Any:
        for number in (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,):
            if isinstance(number, _SYMBOLIC):
                found.update(expression_of(number).free_symbols)
        return leaf

    for node in graph.nodes:
        if node.op != "output":
            fx.node.map_aggregate((node.args, node.kwargs, node.meta.get("val")), look)
    return found


@contextlib.contextmanager
def symbols_allowed() -> Iterator[None]:
    """Inside, graphs may be built whose calls have symbolic arguments; torch warns of them, and `take_sizes` takes them out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Raw SymInt value")
        yield


def take_sizes(graph: fx.Graph) -> tuple[Expression, ...]:
    """Make every symbolic number in the arguments of calls an input of the graph, after those that it has; gives their expressions."""
    made: dict[Expression, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    given = [node.meta[_SIZE] for node in graph.nodes if node.op == "placeholder" and _SIZE in node.meta]

    def argument(leaf: Any) -> Any:
        if not isinstance(leaf, _SYMBOLIC):
            return leaf
        expression = expression_of(leaf)
        if not expression.free_symbols:
            return _number(expression)
        if expression not in made:
            with graph.inserting_before(first):
                made[expression] = graph.placeholder(f"size{len(made)}")
            made[expression].meta["val"] = leaf
        return made[expression]

    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, argument)
            node.kwargs = fx.node.map_aggregate(node.kwargs, argument)
    return (*given, *made)


def with_sizes(call: Callable[[list[Any]], Any], numbers: Sequence[int | float | bool]) -> Callable[[list[Any]], Any]:
    """`call` with these numbers after the arguments that it is given."""

    def sized(args: list[Any]) -> Any:
        args.extend(numbers)
        return call(args)

    return sized
