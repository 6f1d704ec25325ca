"""Footprints of hand-made graphs to the byte, and of lowered codes against the allocator."""

import gc
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.codes import Code
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.liveness import Footprint, storages
from chunkft_compile.lowering import Lowering
from tests.compiler.joint import demands, lowered
from tests.support.allocator import allocator_or_skip

aten = torch.ops.aten
KIB = 1024
NOTHING: frozenset[int] = frozenset()
BOTH = frozenset({0, 1})


def _no_temporary(node: fx.Node) -> int:
    return 0


class Tiny:
    """A graph in which every tensor that is made takes 1 KiB."""

    def __init__(self, arguments: int = 1) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.x = [self.graph.placeholder(f"x{i}") for i in range(arguments)]
        for node in self.x:
            with self.mode:
                node.meta["val"] = torch.empty(256)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call with its fake value."""
        node = self.graph.call_function(target, args)
        fakes = fx.node.map_arg(args, lambda source: source.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fakes)
        return node

    def footprint(self, *results: fx.Node) -> Footprint:
        """The footprint once `results` are returned."""
        self.graph.output(results)
        return Footprint(self.graph)


def test_a_chain_keeps_two_values() -> None:
    tiny = Tiny()
    a = tiny.call(aten.neg.default, tiny.x[0])
    b = tiny.call(aten.neg.default, a)
    found = tiny.footprint(tiny.call(aten.neg.default, b))
    assert found.transient_nbytes(NOTHING, _no_temporary) == 2 * KIB  # a and b, then b and the result
    assert found.transient_nbytes(frozenset({0}), _no_temporary) == KIB  # x dies while a is made: x was live on entry
    assert found.outputs == ((-1, KIB),)


def test_an_argument_that_is_not_freed_does_not_count() -> None:
    tiny = Tiny(2)
    found = tiny.footprint(tiny.call(aten.add.Tensor, tiny.x[0], tiny.x[1]))
    assert found.inputs == (0, 1)
    assert found.transient_nbytes(NOTHING, _no_temporary) == found.transient_nbytes(BOTH, _no_temporary) == KIB


def test_a_constant_of_the_graph_is_there_all_the_time() -> None:
    tiny = Tiny()
    constant = tiny.graph.get_attr("table")
    with tiny.mode:
        constant.meta["val"] = torch.empty(256)
    a = tiny.call(aten.add.Tensor, tiny.x[0], constant)
    assert tiny.footprint(tiny.call(aten.neg.default, a)).transient_nbytes(NOTHING, _no_temporary) == 2 * KIB


def test_freed_arguments_make_room_for_what_follows() -> None:
    tiny = Tiny(2)
    a = tiny.call(aten.add.Tensor, tiny.x[0], tiny.x[1])
    b = tiny.call(aten.neg.default, a)
    found = tiny.footprint(a, b, tiny.call(aten.neg.default, b))
    assert found.transient_nbytes(NOTHING, _no_temporary) == 3 * KIB
    assert found.transient_nbytes(frozenset({0}), _no_temporary) == 2 * KIB
    assert found.transient_nbytes(BOTH, _no_temporary) == KIB


def test_a_view_keeps_its_storage() -> None:
    tiny = Tiny()
    a = tiny.call(aten.neg.default, tiny.x[0])
    view = tiny.call(aten.view.default, a, [16, 16])
    b = tiny.call(aten.neg.default, tiny.x[0])  # a is not read again, its view is
    c = tiny.call(aten.add.Tensor, view, tiny.call(aten.view.default, b, [16, 16]))
    assert tiny.footprint(c).transient_nbytes(NOTHING, _no_temporary) == 3 * KIB


def test_arguments_and_results_in_one_storage() -> None:
    tiny = Tiny(2)
    with tiny.mode:
        tiny.x[1].meta["val"] = tiny.x[0].meta["val"].view(16, 16)
    a = tiny.call(aten.neg.default, tiny.x[0])
    found = tiny.footprint(tiny.call(aten.t.default, tiny.x[1]), a, tiny.call(aten.view.default, a, [16, 16]))
    assert found.inputs == (0, 0)
    assert found.outputs == ((0, 0), (-1, KIB), (-1, KIB))
    assert found.transient_nbytes(NOTHING, _no_temporary) == KIB


def test_temporaries_stand_on_top() -> None:
    tiny = Tiny()
    a = tiny.call(aten.neg.default, tiny.x[0])
    b = tiny.call(aten.exp.default, a)
    found = tiny.footprint(tiny.call(aten.neg.default, b))
    temporary = {a: 100, b: 10}
    assert found.transient_nbytes(NOTHING, lambda node: temporary.get(node, 0)) == 2 * KIB + 10
    temporary[a] = 5 * KIB
    assert Footprint(tiny.graph).transient_nbytes(NOTHING, lambda node: temporary.get(node, 0)) == 6 * KIB


def test_gradients_count_as_nothing() -> None:
    tiny = Tiny()
    a = tiny.call(aten.neg.default, tiny.x[0])
    b = tiny.call(aten.neg.default, a)
    found = tiny.footprint(a, b)
    assert found.transient_nbytes(NOTHING, _no_temporary) == 2 * KIB
    assert found.transient_nbytes(NOTHING, _no_temporary, gradients=frozenset({0})) == KIB
    assert found.transient_nbytes(NOTHING, _no_temporary, gradients=BOTH) == 0


def test_items_of_a_tuple_die_one_by_one() -> None:
    tiny = Tiny()
    both = tiny.call(aten.aminmax.default, tiny.x[0])
    with tiny.mode:
        both.meta["val"] = (torch.empty(256), torch.empty(512))
    small, large = (tiny.graph.call_function(_item, (both, i)) for i in (0, 1))
    small.meta["val"], large.meta["val"] = both.meta["val"]
    found = tiny.footprint(tiny.call(aten.neg.default, small), tiny.call(aten.neg.default, large))
    assert found.transient_nbytes(NOTHING, _no_temporary) == 5 * KIB  # 1 + 2 made, 1 - 0 ... then 1 + 2 + 2: small is gone


def _item(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    return values[index]


def test_a_value_nobody_reads_dies_at_once() -> None:
    tiny = Tiny()
    tiny.call(aten.neg.default, tiny.x[0])
    found = tiny.footprint(tiny.call(aten.neg.default, tiny.x[0]))
    assert found.transient_nbytes(NOTHING, _no_temporary) == KIB


# ---- against the allocator


def _arguments(code: Code) -> list[Any]:
    """Real arguments, one storage where the fake ones share it; integers are valid indices."""
    made: dict[int, torch.Tensor] = {}
    found: list[Any] = []
    for node in code.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            found.append(0)
            continue
        ((storage, nbytes),) = storages(value).items()
        if storage not in made:
            count = nbytes // value.element_size()
            made[storage] = torch.rand(count).to(value.dtype)
        found.append(made[storage].view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset()))
    return found


def _measured(code: Code, *, freed: bool) -> int:
    """Bytes above entry while the code runs boxed, with all its arguments handed over or all kept."""
    allocator = allocator_or_skip()
    arguments = _arguments(code)
    kept = [] if freed else list(arguments)
    gc.collect()
    allocator.reset()
    before = allocator.live()
    with torch.no_grad():
        results = code.call(arguments)
    peak = allocator.peak() - before
    del results, kept
    return peak


@pytest.mark.parametrize("freed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("option", ["save", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inputs", "cheap", "tiled 3"))])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2-tied", marks=pytest.mark.slow)])
def test_lowered_codes_take_what_is_predicted(name: str, option: str, freed: bool) -> None:
    lowering, costs = lowered(name), OperatorCosts(torch.device("cpu"))
    options = [option if lowering.has_option(segment, option) else "inputs" for segment in lowering.segments]
    assert option in options
    pairs = list(zip(lowering.segments, options, strict=True))
    codes = [lowering.backward(segment, demands(lowering, segment), name) for segment, name in pairs]
    codes += [_forward(lowering, code, *pair) for code, pair in zip(codes, pairs, strict=True)]
    costs.measure(code.graph for code in codes)
    for code in codes:
        groups = frozenset(code.footprint.inputs) if freed else NOTHING
        assert _measured(code, freed=freed) == code.footprint.transient_nbytes(groups, costs.temporary_nbytes)


def _forward(lowering: Lowering, backward: Code, segment: Any, option: str) -> Code:
    saved = {read.position for read in backward.reads if read.position >= 0}
    return lowering.forward(segment, lowering.exports(segment) | saved, option)
