"""What may wait in the store: the stream from below and what a segment saves itself, and nothing that another call reads."""

from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn

from chunkft_compile.assembly import Assembled
from chunkft_compile.capture import capture
from chunkft_compile.liveness import storages
from chunkft_compile.lowering import OPTIONS, Lowering
from chunkft_compile.planner.program import Op, simulate
from chunkft_compile.segments import cut
from tests.compiler.joint import halves, lowered, whole_rows
from tests.compiler.test_lowering import assembled


def _from_below(lowering: Lowering, number: int) -> list[fx.Node]:
    """Values that segment `number` gets from others and that can be moved."""
    segment = lowering.segments[number]
    away = lowering.movable.of(segment)
    return [node for node in segment.externals if node in lowering.owner and not away.isdisjoint(storages(node.meta["val"]))]


def _moves(made: Assembled, op: Op) -> list[int]:
    return [i.segment for i in made.program.instructions if i.op is op and (i.reads or i.writes)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_the_residual_stream_can_be_moved(name: str) -> None:
    lowering = lowered(name)
    assert _from_below(lowering, 0) == []  # the batch is not the step's
    for number in (1, 2):
        (stream,) = _from_below(lowering, number)
        assert stream.meta["val"].shape[-1] == 16


def test_what_a_lower_backward_reads_stays() -> None:
    lowering = lowered("sequential")  # ReLU saves its output, the input of the next segment; GELU saves its own input
    assert [len(_from_below(lowering, number)) for number in range(3)] == [0, 1, 0]


class _Skipping(nn.Module):
    """The first layer's result is read by the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.layers[0](x)
        second = self.layers[1](first.tanh())
        return self.layers[2](second.tanh() + first)  # type: ignore[no-any-return]


class _Showing(_Skipping):
    """The results of two layers are outputs."""

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:  # type: ignore[override]
        first = self.layers[0](x)
        second = self.layers[1](first.tanh())
        return self.layers[2](second.tanh()), second


@pytest.mark.parametrize("model", [_Skipping, _Showing])
def test_what_others_read_or_the_caller_gets_stays(model: type[nn.Module]) -> None:
    found = capture(model(), (torch.randn(4, 8),), {})
    lowering = Lowering(found, cut(found))
    first = next(node for node in lowering.segments[0].nodes if "addmm" in node.name)
    for segment in lowering.segments:
        away = lowering.movable.of(segment)
        for node in found.outputs:
            assert away.isdisjoint(storages(node.meta["val"]))
        if model is _Skipping:
            assert away.isdisjoint(storages(first.meta["val"]))


@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "shared"])
def test_programs_move_after_forward_and_before_backward(name: str, accumulating: bool) -> None:
    lowering = lowered(name)
    made = assembled(lowering, halves(lowering), "offload", accumulating=accumulating)
    plain = assembled(lowering, halves(lowering), "inputs", accumulating=accumulating)
    ends = [simulate(program.program).moments[-1].after_nbytes for program in (made, plain)]  # raises where bytes stay that should go
    assert ends[0] == ends[1]
    evicted, fetched = _moves(made, Op.EVICT), _moves(made, Op.FETCH)
    assert evicted == sorted(evicted) == fetched[::-1]
    assert len(evicted) >= 2
    listed = made.program.instructions
    for number, instruction in enumerate(listed):
        if instruction.op is Op.EVICT and instruction.reads:
            assert (listed[number - 1].op, listed[number - 1].segment) == (Op.FORWARD, instruction.segment)
        if instruction.op is Op.FETCH and instruction.writes:
            assert (listed[number + 1].op, listed[number + 1].segment) == (Op.BACKWARD, instruction.segment)
            assert set(instruction.writes) <= set(listed[number + 1].reads)
    assert made.codes == plain.codes
    most = [max(m.after_nbytes for m in simulate(p.program).moments if m.op is Op.FORWARD) for p in (made, plain)]
    assert most[0] < most[1]


@pytest.mark.parametrize("others", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "bert", "sequential", "normed", "shared"])
def test_any_neighbours_leave_it_sound(name: str, others: str) -> None:
    lowering = lowered(name)
    for number in range(len(lowering.segments)):
        options = [others] * len(lowering.segments)
        options[number] = "offload"
        made = assembled(lowering, whole_rows(lowering), options)
        simulate(made.program)
        moved = lowering.movable.of(lowering.segments[number])
        read = {s for v in _read_by_backward(made, lowering, number) for s in storages(v.meta["val"])}
        assert bool(_moves(made, Op.EVICT)) == bool(moved & read)


def _read_by_backward(made: Assembled, lowering: Lowering, number: int) -> list[fx.Node]:
    """Forward values that the backward of a segment takes."""
    call = next(i for i in made.program.instructions if i.op is Op.BACKWARD and i.segment == number)
    segment = lowering.segments[number]
    return [segment.at(read.position) for read in made.codes[call.code].reads]
