"""The planner's tables: bounds for any chunks of a step, found with few of them."""

import functools
import itertools

import pytest
import torch

from benchmarks.zoo import ZOO
from chunkft_compile import probing
from chunkft_compile.assembly import Rows, propagate
from chunkft_compile.capture import capture
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.lowering import Lowering
from chunkft_compile.probing import probe
from chunkft_compile.segments import cut
from tests.compiler import joint
from tests.compiler.joint import whole_rows

COSTS = OperatorCosts(torch.device("cpu"))
OPT = "OPT"
"""Its positions are computed from the mask, so what chunks of their embedding read can be freed."""
CASES = ["llama-tied", "bert", "normed", "shared", OPT]


@functools.cache
def lowered(name: str) -> Lowering:
    """A lowering of a case of `tests.models`, or of one of the zoo."""
    if name != OPT:
        return joint.lowered(name)
    entry = next(entry for entry in ZOO if entry.name == name)
    found = capture(entry.model(), (), entry.inputs())
    return Lowering(found, cut(found))


def pieces(lowering: Lowering, count: int) -> list[Rows]:
    """Every trained parameter in `count` chunks of equal length, and a shorter one; embeddings row by row."""
    found = []
    for rows in whole_rows(lowering).values():
        length = 1 if "embed" in rows.param else max(1, -(-rows.size // count))
        found += [Rows(rows.param, a, b, rows.size) for a, b in itertools.pairwise([*range(0, rows.size, length), rows.size])]
    return found


@pytest.mark.parametrize("name", CASES)
def test_as_many_equal_chunks_as_one_likes_need_no_more_than_the_table_says(name: str) -> None:
    """Beside their gradients. An embedding's chunks read the same indices one after the other: only the last may free them."""
    lowering = lowered(name)
    rows = pieces(lowering, 6)
    table, wanted = probe(lowering, rows, COSTS), probing._wanted(lowering, rows)
    outside = probing._base(lowering) | set(probing._shared(lowering, probing._base(lowering)))
    everything = propagate(lowering, dict(enumerate(rows)), ["save"] * len(lowering.segments))
    longest = 0
    for number, (code, _, _) in everything.codes.items():
        segment = lowering.segments[number]
        forward = probing._forward(lowering, segment, code, "save")
        COSTS.measure([code.graph, forward.graph])
        exact = probing._cost(segment, wanted[number], "save", code, forward, outside, COSTS)
        bound = table.kinds[table.segments[number].kind].active[0]
        assert bound.option == "save"
        assert (exact.saved_nbytes, exact.backward_peak_nbytes) == (bound.saved_nbytes, bound.backward_peak_nbytes), segment.name
        longest = max(longest, len(code.demands))
    assert longest > 6


@pytest.mark.parametrize("name", CASES)
def test_chunks_do_not_make_codes_longer(name: str) -> None:
    lowering = lowered(name)
    lengths = []
    for count in (3, 30):
        rows = pieces(lowering, count)
        table, wanted = probe(lowering, rows, COSTS), probing._wanted(lowering, rows)
        lengths.append(max(len(found.active) for found in wanted))
        assert len(table.chunks) == len(rows)
        assert {number for found in wanted for _, number in found.own} == set(range(len(rows)))
    assert lengths[1] <= lengths[0] + 2  # a parameter may have three chunks of one length, or few of one and one of another
