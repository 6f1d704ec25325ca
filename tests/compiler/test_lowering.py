"""Lowered codes: equal gradients for every option, dropout drawn once, codes shared by kind, nothing computed that is not needed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import fx

from chunkft_compile.assembly import Assembled, Rows, Update, assemble
from chunkft_compile.capture import capture
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.lowering import OPTIONS, Lowering
from chunkft_compile.runtime.engine import Run
from chunkft_compile.segments import cut
from tests import models
from tests.compiler.joint import demands, halves, lowered, whole_rows

CPU = torch.device("cpu")
COSTS = OperatorCosts(CPU)


def assembled(lowering: Lowering, chunks: Mapping[int, Rows], option: str | list[str] = "save", *, accumulating: bool = False) -> Assembled:
    """The program that trains `chunks`, stepped all together, with 100 bytes of state each."""
    update = Update((tuple(chunks),), (0,), dict.fromkeys(chunks, 100), dict.fromkeys(chunks, 1), dict.fromkeys(chunks, 1), (0,))
    sizes = {number: _nbytes(lowering, rows) for number, rows in chunks.items()}
    options = [option] * len(lowering.segments) if isinstance(option, str) else option
    return assemble(lowering, chunks, options, base_nbytes=0, grad_nbytes=sizes, costs=COSTS, update=update, accumulating=accumulating)


def _nbytes(lowering: Lowering, rows: Rows) -> int:
    value = lowering.capture.gradients[rows.param].meta["val"]
    return int(value.nbytes) * (rows.stop - rows.start) // rows.size


def run(
    lowering: Lowering, model: torch.nn.Module, batch: list[torch.Tensor], chunks: Mapping[int, Rows], option: str
) -> dict[int, torch.Tensor]:
    """The gradients of `chunks` for the sum of the outputs."""
    made = assembled(lowering, chunks, option)
    found = lowering.capture
    sources: dict[int, Any] = {}
    tangents: dict[int, torch.Tensor] = {}
    for value, node in made.bindings.items():
        if node in found.params:
            sources[value] = model.get_parameter(found.params[node]).detach()
        elif node in found.buffers:
            sources[value] = model.get_buffer(found.buffers[node])
        elif node in found.inputs:
            sources[value] = batch[found.inputs[node]]
        elif node in found.tangents:
            tangents[value] = torch.ones(node.meta["val"].shape)
        else:
            sources[value] = found.constants[node]
    leaves = {number: torch.nn.Parameter(_rows(model, rows)) for number, rows in chunks.items()}
    step = Run(made.program, [code.call for code in made.codes], sources, leaves)
    step.forward()
    step.backward(tangents)
    return {number: leaf.grad for number, leaf in leaves.items() if leaf.grad is not None}


def _rows(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    weight = model.get_parameter(rows.param).detach()
    return weight[rows.start : rows.stop].clone() if weight.dim() else weight.clone()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama-tied", "bert", "normed", "shared"])
def test_every_option_gives_the_rows_of_autograd(name: str, option: str) -> None:
    case = next(case for case in models.CASES if case.name == name)
    model, (args, kwargs) = case.build(), case.arguments()
    lowering = lowered(name)
    batch = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
    chunks = halves(lowering)
    gradients = run(lowering, model, batch, chunks, option)
    output = model(*args, **kwargs)
    torch.autograd.backward((output.loss if hasattr(output, "loss") else output).sum())
    assert set(gradients) == set(chunks)
    for number, rows in chunks.items():
        dense = model.get_parameter(rows.param).grad
        assert dense is not None
        torch.testing.assert_close(gradients[number], dense[rows.start : rows.stop] if dense.dim() else dense, rtol=1e-4, atol=1e-5)


def test_dropout_is_saved_and_never_drawn_again() -> None:
    model, batch = models.gpt2(dropout=0.3).train(), models.token_batch()
    found = capture(model, (), batch)
    lowering = Lowering(found, cut(found))
    chunks = whole_rows(lowering)
    gradients = {}
    for option in OPTIONS:
        assembled(lowering, chunks, option)  # measures operators, dropout too
        torch.manual_seed(3)
        gradients[option] = run(lowering, model, list(batch.values()), chunks, option)
        for segment in lowering.segments:
            code = lowering.backward(segment, demands(lowering, segment, sliced=False), option)
            assert not [node for node in code.graph.nodes if "dropout" in str(node.target) and "backward" not in str(node.target)]
    for option in OPTIONS[1:]:
        for number in chunks:
            torch.testing.assert_close(gradients[option][number], gradients["save"][number], rtol=1e-4, atol=1e-5)


def test_codes_are_shared_by_the_segments_of_a_kind() -> None:
    found = lowered("llama").capture
    lowering = Lowering(found, cut(found))
    _, *blocks, _ = lowering.segments
    wanted = demands(lowering, blocks[0])
    made = {lowering.backward(block, wanted, "save") for block in blocks}
    assert len(made) == 1
    before = len(lowering.codes)
    assert len({lowering.backward(block, wanted, "inputs") for block in blocks} | made) == 2
    assert len(lowering.codes) == before + 1


@pytest.mark.slow
def test_a_sweep_needs_no_more_codes_for_more_blocks() -> None:
    counts = []
    for layers in (2, 4):
        found = capture(models.llama(num_hidden_layers=layers).train(), (), models.token_batch())
        lowering = Lowering(found, cut(found))
        assembled(lowering, halves(lowering))
        counts.append(len(lowering.codes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("option", OPTIONS)
def test_no_node_has_the_shape_of_a_dense_gradient(option: str) -> None:
    lowering = lowered("llama")
    shapes = {name: tuple(node.meta["val"].shape) for name, node in lowering.capture.gradients.items() if node.meta["val"].dim() == 2}
    chunks = {i: Rows(name, 1, 4, shape[0]) for i, (name, shape) in enumerate(shapes.items())}  # 3 rows: no weight has as many
    for code in assembled(lowering, chunks, option).codes:
        for node in _computed(code.graph):
            if code.demands and isinstance(node.meta["val"], torch.Tensor):
                views = str(node.target).startswith(("aten.t.", "aten.transpose", "aten.permute", "aten.view"))
                assert views or tuple(node.meta["val"].shape) not in shapes.values(), f"{node} in {option}"


def _computed(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def test_more_is_saved_by_save_than_by_cheap_than_by_inputs() -> None:
    lowering = lowered("llama")
    block = lowering.segments[1]
    wanted = demands(lowering, block)
    saved = []
    for option in OPTIONS:
        reads = lowering.backward(block, wanted, option).reads
        values = [block.at(read.position).meta["val"] for read in reads if read.position >= 0]
        saved.append(sum(value.nbytes for value in values))
    assert saved[0] > saved[1] > saved[2] == 0
