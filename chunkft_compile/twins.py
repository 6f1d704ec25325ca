"""One capture for batches of many sizes: a *twin* of the planned capture whose sizes are symbols.

Plans need bytes, and so numbers: every program belongs to a capture with concrete sizes. Its twin has the same graph, node by node,
with expressions for sizes. From it come, without tracing again, the capture for other sizes, and the codes that run a planned
program on a smaller batch: the instructions are the same, their bytes are then upper bounds.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from chunkft_compile.assembly import Assembled
from chunkft_compile.capture import Capture
from chunkft_compile.codes import Code
from chunkft_compile.errors import CaptureError
from chunkft_compile.fakes import fake_value
from chunkft_compile.lowering import Lowering
from chunkft_compile.passes.mixed_norms import correct_statistics
from chunkft_compile.planner.program import Op
from chunkft_compile.runtime.engine import Call
from chunkft_compile.segments import Segment, cut
from chunkft_compile.sizes import Guards, Sizes, SymbolicTiles, Symbols, is_symbolic, symbols_allowed, symbols_in, with_sizes

logger = logging.getLogger(__name__)


class Twin:
    """A capture with symbolic sizes; `symbols` says where they stand in a batch.

    Raises `CaptureError` where other numbers are symbolic, such as those that are read from the values of the batch.
    """

    def __init__(self, capture: Capture, symbols: Symbols) -> None:
        self.capture = capture
        environment = capture.fake_mode.shape_env
        assert environment is not None, "symbolic sizes come of one"
        self._symbols, self._guards, self._tiles = symbols, Guards(environment), SymbolicTiles(environment)
        if strange := symbols_in(capture.graph) - set(symbols.places):
            raise CaptureError(f"sizes depend on {', '.join(map(str, strange))}, which the sizes of the batch do not tell")
        self.lowering = Lowering(capture, cut(capture), self._tiles)

    def sizes(self, batch: Sequence[torch.Tensor]) -> Sizes | None:
        """The sizes of a batch; None where this graph is not right for them."""
        sizes = self._tiles.sizes(self._symbols.read(batch), 2, 2)  # until there are tiles
        fits = all(_matches(node.meta["val"], batch[number], sizes) for node, number in self.capture.inputs.items() if node.users)
        return sizes if fits and self._guards.hold(sizes) else None

    def at(self, sizes: Sizes) -> Capture:
        """The capture for these sizes: every call of the graph once more, on fake tensors of numbers."""
        old, graph = self.capture, fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in old.graph.nodes:
            if node.op == "output":
                graph.output(sizes.of(fx.node.map_arg(node.args[0], new.__getitem__))).meta = dict(node.meta)
                continue
            new[node] = graph.create_node(node.op, node.target, *_arguments(node, new, sizes), name=node.name)
            new[node].meta = node.meta | {"val": self._value(node, new[node], sizes)}
        correct_statistics(graph, old.fake_mode)

        def moved(found: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
            return {new[node]: value for node, value in found.items()}

        return Capture(
            graph,
            old.fake_mode,
            moved(old.params),
            moved(old.buffers),
            moved(old.inputs),
            moved(old.tangents),
            moved(old.constants),
            tuple(new[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in old.outputs),
            {name: new[node] for name, node in old.gradients.items()},
            {name: new[node] for name, node in old.mutations.items()},
            old.out_spec,
            old.lost,
        )

    def _value(self, node: fx.Node, new: fx.Node, sizes: Sizes) -> Any:
        value: Any = node.meta.get("val")
        if node.op == "call_function":
            return fake_value(new, self.capture.fake_mode)
        if is_symbolic(value):
            with self.capture.fake_mode:
                return torch.empty_strided(sizes.shape(value), sizes.stride(value), dtype=value.dtype, device=value.device)
        return value

    def calls(self, assembled: Assembled, planned: Sizes, sizes: Sizes) -> list[Call] | None:
        """What the instructions of a program for `planned` call on a batch of `sizes`; None where there are no codes for that."""
        found: dict[int, tuple[Code, Sizes]] = {}
        with symbols_allowed():
            for instruction in assembled.program.instructions:
                if instruction.op in (Op.FORWARD, Op.BACKWARD):
                    code, segment = assembled.codes[instruction.code], self.lowering.segments[instruction.segment]
                    try:
                        option, own = self.lowering.retiled(segment, code.option, planned, sizes)
                        made = self._lower(segment, code, option)
                    except (ValueError, RuntimeError) as error:
                        logger.debug("%s: %s", segment.name, error)
                        return None
                    if made.reads != code.reads or found.setdefault(instruction.code, (made, own))[0] is not made:
                        return None
        if not all(self._guards.hold(own) for _, own in found.values()):
            return None
        return [_bind(*found[number]) for number in range(len(assembled.codes))]

    def _lower(self, segment: Segment, code: Code, option: str) -> Code:
        """The code that computes what `code` does."""
        if code.demands:
            return self.lowering.backward(segment, code.demands, option)
        return self.lowering.forward(segment, code.writes, option)


def _bind(code: Code, sizes: Sizes) -> Call:
    return with_sizes(code.call, [sizes[expression] for expression in code.sizes]) if code.sizes else code.call


def _arguments(node: fx.Node, new: Mapping[fx.Node, fx.Node], sizes: Sizes) -> tuple[Any, Any]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
    return sizes.of(args), sizes.of(kwargs)


def _matches(value: torch.Tensor, tensor: torch.Tensor, sizes: Sizes) -> bool:
    """Whether a symbolic input is this tensor for these sizes. Strides of dimensions of one element say nothing."""
    if sizes.shape(value) != tuple(tensor.shape):
        return False
    pairs = zip(tensor.shape, sizes.stride(value), tensor.stride(), strict=True)
    return all(size == 1 or expected == stride for size, expected, stride in pairs)


def is_same_graph(one: Capture, other: Capture, segments: Sequence[Segment], others: Sequence[Segment]) -> bool:
    """Whether two captures have the same segments in the same order, that say the same of the same inputs and results."""
    if [segment.kind for segment in segments] != [segment.kind for segment in others]:
        return False
    twin_of = dict(_inputs(one, other))
    for segment, copy in zip(segments, others, strict=True):
        twin_of |= dict(zip(segment.nodes, copy.nodes, strict=True))
    pairs: list[tuple[Any, Any]] = [
        pair for a, b in zip(segments, others, strict=True) for pair in zip(a.externals, b.externals, strict=True)
    ]
    pairs += [(node, other.gradients.get(name)) for name, node in one.gradients.items()]
    pairs += [(node, other.mutations.get(name)) for name, node in one.mutations.items()]
    pairs += list(zip(one.outputs, other.outputs, strict=False))
    sizes = [(len(found.gradients), len(found.mutations), len(found.outputs)) for found in (one, other)]
    same = (twin_of.get(node) is copy if isinstance(node, fx.Node) else node == copy for node, copy in pairs)
    return sizes[0] == sizes[1] and one.out_spec == other.out_spec and one.lost == other.lost and all(same)


def _inputs(one: Capture, other: Capture) -> list[tuple[fx.Node, fx.Node]]:
    """Placeholders of the same name or position, and constants of the same values in the same order. Tied weights share a name."""
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for place in ("params", "buffers", "inputs", "tangents"):
        mine, theirs = getattr(one, place), getattr(other, place)
        pairs += [(a, b) for (a, name), (b, same) in zip(mine.items(), theirs.items(), strict=False) if name == same]
    constants = zip(one.constants.items(), other.constants.items(), strict=False)
    return pairs + [(a, b) for (a, mine), (b, theirs) in constants if mine.dtype == theirs.dtype and torch.equal(mine, theirs)]
