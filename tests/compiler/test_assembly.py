"""Programs: they simulate, stop at the depth of the step, and frozen segments keep nothing."""

import pytest

from chunkft_compile.assembly import Assembled, Rows
from chunkft_compile.lowering import OPTIONS, Lowering
from chunkft_compile.planner.program import Op, simulate
from tests.compiler.joint import halves, lowered, whole_rows
from tests.compiler.test_lowering import assembled

CASES = ["llama-tied", "bert", "normed", "shared"]


def _of_segment(lowering: Lowering, number: int) -> dict[int, Rows]:
    """Chunks whose gradient is made in one segment."""
    owner = {name: lowering.owner[node] for name, node in lowering.capture.gradients.items()}
    return {i: rows for i, rows in halves(lowering).items() if owner[rows.param] == number}


def _segments(made: Assembled, op: Op) -> list[int]:
    return [instruction.segment for instruction in made.program.instructions if instruction.op is op]


@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_programs_simulate_and_nothing_is_left(name: str, option: str, accumulating: bool) -> None:
    lowering = lowered(name)
    made = assembled(lowering, halves(lowering), option, accumulating=accumulating)
    program = made.program
    timeline = simulate(program)  # raises where a value is read, freed or written out of turn
    held = {program.storage_of[value] for value in program.held}
    outputs = sum(program.storage_nbytes[storage] for storage in held if storage >= 0)
    gradients = timeline.moments[-1].after_nbytes - outputs
    wanted = sum(program.grad_nbytes.values())
    assert wanted <= gradients <= 1.1 * wanted  # an embedding's slice carries one row more


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_backward_stops_at_the_depth(name: str) -> None:
    lowering = lowered(name)
    last = len(lowering.segments) - 1
    for depth in range(last + 1):
        made = assembled(lowering, _of_segment(lowering, depth))
        assert _segments(made, Op.FORWARD) == list(range(last + 1))
        assert _segments(made, Op.BACKWARD) == list(range(last, depth - 1, -1))


def test_frozen_segments_keep_nothing() -> None:
    lowering = lowered("llama")
    depth = 2
    made = assembled(lowering, _of_segment(lowering, depth))
    moments = {(moment.op, moment.segment): moment for moment in simulate(made.program).moments}
    forwards = {instruction.segment: instruction for instruction in made.program.instructions if instruction.op is Op.FORWARD}
    for segment in range(depth):
        exported = lowering.exports(lowering.segments[segment])
        assert set(made.codes[forwards[segment].code].writes) == set(exported)
    below, above = moments[Op.FORWARD, 1], moments[Op.FORWARD, depth]
    assert below.after_nbytes - below.before_nbytes == 0  # one residual stream in, one out
    assert above.after_nbytes > above.before_nbytes


def test_more_options_less_memory() -> None:
    lowering = lowered("llama")
    forward = {}
    for option in OPTIONS:
        moments = simulate(assembled(lowering, whole_rows(lowering), option).program).moments
        forward[option] = max(moment.after_nbytes for moment in moments if moment.op is Op.FORWARD)
    assert forward["save"] > forward["cheap"] > forward["inputs"]


def test_every_active_chunk_gets_its_gradient_once_and_from_its_rows() -> None:
    lowering = lowered("llama-tied")
    chunks = halves(lowering)
    program = assembled(lowering, chunks).program
    emitted = [chunk for instruction in program.instructions for _, chunk in instruction.gradients]
    assert sorted(emitted) == sorted(chunks)
    for instruction in program.instructions:
        sliced = [rows.start for _, number in instruction.gradients if (rows := chunks[number]).demanded is not None]
        assert set(sliced) <= set(instruction.starts)


def test_state_moves_around_its_update() -> None:
    lowering = lowered("mlp")
    program = assembled(lowering, whole_rows(lowering)).program
    assert [instruction.op for instruction in program.instructions[-4:]] == [Op.FETCH, Op.UPDATE, Op.EVICT, Op.FREE]
    assert {instruction.chunks for instruction in program.instructions[-4:]} == {tuple(whole_rows(lowering))}
