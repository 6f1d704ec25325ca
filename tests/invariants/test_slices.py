"""Invariants 1 and 5: a slice's gradient is those rows of the dense gradient, and the dense gradient never exists."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from chunkft_compile.assembly import Rows
from chunkft_compile.codes import Code
from chunkft_compile.lowering import OPTIONS
from tests.conftest import Workshop
from tests.invariants.harness import Bench, bench
from tests.models import CASES, TRANSFORMERS, Case

pytestmark = pytest.mark.usefixtures("captures_once")
few = settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

MOST_PARAMETERS = 4


def _size(found: Bench, name: str) -> int:
    shape = found.dense[name].shape
    return shape[0] if shape else 1


@st.composite
def steps(draw: st.DrawFn, found: Bench) -> tuple[dict[int, Rows], list[str]]:
    """Some parameters cut anywhere, some of the pieces active, and an option for every segment."""
    chunks: dict[int, Rows] = {}
    names = draw(st.lists(st.sampled_from(found.names), min_size=1, max_size=MOST_PARAMETERS, unique=True))
    for name in names:
        size = _size(found, name)
        inner = draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else set()
        edges = [0, *sorted(inner), size]
        pieces = [Rows(name, start, stop, size) for start, stop in itertools.pairwise(edges)]
        active = draw(st.lists(st.sampled_from(pieces), min_size=1, unique_by=lambda rows: rows.start))
        chunks |= {len(chunks) + i: rows for i, rows in enumerate(active)}
    offered = [[o for o in (*OPTIONS, "tiled 3") if found.lowering.has_option(segment, o)] for segment in found.lowering.segments]
    return chunks, [draw(st.sampled_from(options)) for options in offered]


def check(found: Bench, chunks: dict[int, Rows], options: list[str]) -> None:
    gradients = found.gradients(chunks, options)
    for number, rows in chunks.items():
        dense = found.dense[rows.param]
        expected = dense[rows.start : rows.stop] if dense.dim() else dense
        gradient = gradients[number]
        assert gradient is not None, rows
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=partial("{}, {}: {}".format, rows, options))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@few
@given(data=st.data())
def test_any_slices_are_rows_of_the_dense_gradient(workshop: Workshop, case: Case, data: st.DataObject) -> None:
    found = bench(workshop, case)
    chunks, options = data.draw(steps(found))
    check(found, chunks, options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_parameters_in_uneven_halves(workshop: Workshop, case: Case, option: str) -> None:
    found = bench(workshop, case)
    pieces = []
    for name in found.names:
        size = _size(found, name)
        edges = sorted({0, size // 3, size})
        pieces += [Rows(name, start, stop, size) for start, stop in itertools.pairwise(edges)]
    check(found, dict(enumerate(pieces)), [option] * len(found.lowering.segments))


def _own_tensors(graph: fx.Graph) -> list[torch.Tensor]:
    """Results of calls that are not views of what the code was given."""
    given_storages = {
        node.meta["val"].untyped_storage()._cdata
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta["val"], torch.Tensor)
    }
    results = [node.meta["val"] for node in graph.nodes if node.op == "call_function"]
    tensors = [value for result in results for value in (result if isinstance(result, tuple | list) else [result])]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given_storages]


def _is_made_dense(codes: tuple[Code, ...], dense: torch.Tensor) -> bool:
    """Whether a backward makes a tensor of this shape, or transposed, as a matrix product gives it."""
    made = [t for code in codes if code.demands for t in _own_tensors(code.graph)]
    return any(sorted(t.shape) == sorted(dense.shape) for t in made)


@pytest.mark.parametrize("option", ["save", "tiled 3"])
@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.name)
def test_no_backward_makes_the_dense_gradient_of_a_split_parameter(workshop: Workshop, case: Case, option: str) -> None:
    found = bench(workshop, case)
    options = found.options(option)
    for name, dense in found.dense.items():
        size = len(dense)
        if size < 4:  # the slice of an embedding has one row more than asked for: as many as two or three rows have
            continue
        whole = found.assemble({0: Rows(name, 0, size, size)}, options)
        assert _is_made_dense(whole.codes, dense), f"this test would not see the dense gradient of {name}"
        split = found.assemble({0: Rows(name, 1, size - 1, size)}, options)
        assert split.dense == ()
        assert not _is_made_dense(split.codes, dense), name
