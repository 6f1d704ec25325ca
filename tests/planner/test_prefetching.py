"""Copies move away from the calls that wait for them: the same calls in the same order, no byte over the limit, and never slower."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.planner.prefetching import overlap
from chunkft_compile.planner.problem import Update
from chunkft_compile.planner.program import Instruction, Op, Program, simulate

GENEROUS = 10**9


def _program(
    layers: int, *, update: Update, call_us: int = 10, copy_us: int = 4, streamed: bool = True, offloaded: bool = False
) -> Program:
    """Segments with one chunk each: values `s` (saved, 100 bytes), `layers + s` (gradient), `2 layers + s` (the weights)."""
    forward, backward = [], []
    immediate = update is Update.IMMEDIATE
    for s in range(layers):
        weight = 2 * layers + s
        fetch = Instruction(Op.FETCH, s, writes=(weight,), weights=(s,), us=copy_us)
        let_go = Instruction(Op.FREE, s, frees=(weight,), weights=(s,))
        reads, inside = ((weight,), (s,)) if streamed else ((), ())
        call = Instruction(Op.FORWARD, s, reads=reads, writes=(s,), weights=inside, transient_nbytes=130, us=call_us)
        away = [Instruction(Op.EVICT, s, reads=(s,), us=copy_us), Instruction(Op.FREE, s, frees=(s,))] if offloaded else []
        forward += [*([fetch] if streamed else []), call, *([let_go] if streamed else []), *away]
        back = Instruction(
            Op.BACKWARD, s, reads=(s, *reads), writes=(layers + s,), frees=(s,), gradients=((layers + s, s),), weights=inside,
            transient_nbytes=150, us=2 * call_us,
        )  # fmt: skip
        applied, freed = (((layers + s, s),), (layers + s,)) if immediate else ((), ())
        moves = [
            Instruction(Op.FETCH, s if immediate else -1, chunks=(s,), us=copy_us),
            Instruction(Op.UPDATE, s if immediate else -1, chunks=(s,), transient_nbytes=5, us=1, gradients=applied, frees=freed),
            Instruction(Op.EVICT, s if immediate else -1, chunks=(s,), us=copy_us),
            Instruction(Op.FREE, s if immediate else -1, chunks=(s,)),
        ]
        written = [Instruction(Op.EVICT, s, weights=(s,), us=copy_us)] if immediate and streamed else []
        before = [*([Instruction(Op.FETCH, s, writes=(s,), us=copy_us)] if offloaded else []), *([fetch] if streamed else [])]
        after = [*moves, *written] if immediate else []
        backward.append(([*before, back, *after, *([let_go] if streamed else [])], moves))
    steps = [*forward, *(step for part, _ in reversed(backward) for step in part)]
    if not immediate:
        steps += [step for _, moves in reversed(backward) for step in moves]
    numbers = range(layers)
    return Program(
        tuple(steps),
        base_nbytes=1000,
        storage_of=(*numbers, *(layers + s for s in numbers), *(-1 for _ in numbers)),
        storage_nbytes=(100,) * layers + (30,) * layers,
        held=(),
        grad_nbytes=dict.fromkeys(numbers, 30),
        state_nbytes=dict.fromkeys(numbers, 60),
        update=update,
        weight_nbytes=dict.fromkeys(numbers, 40) if streamed else {},
        homes={s: s for s in numbers} if streamed and immediate else {},
        overlaps=True,
    )


def _calls(program: Program) -> list[Instruction]:
    return [step for step in program.instructions if step.op in (Op.FORWARD, Op.BACKWARD, Op.UPDATE)]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from(Update),
    st.integers(0, 30),
    st.integers(0, 30),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1200),
    st.booleans(),
)
def test_nothing_changes_but_bytes_and_time(
    layers: int, update: Update, call_us: int, copy_us: int, streamed: bool, offloaded: bool, spare: int, accumulating: bool
) -> None:
    program = _program(layers, update=update, call_us=call_us, copy_us=copy_us, streamed=streamed, offloaded=offloaded)
    if accumulating and update is Update.HELD:
        program = replace(program, accumulating=True)
    plain = simulate(program)
    limit = plain.peak_nbytes + spare
    found = overlap(program, limit)
    line = simulate(found)  # raises where something is read before it is there, or freed before the store has it
    assert line.peak_nbytes <= limit
    assert _calls(found) == _calls(program)
    assert line.moments[-1].after_nbytes == plain.moments[-1].after_nbytes
    assert line.us <= simulate(replace(program, overlaps=False)).us
    moved, before = (Counter(step for step in steps if step.op is not Op.FREE) for steps in (found.instructions, program.instructions))
    assert not moved - before
    assert all(step.op is Op.FETCH and step.weights for step in before - moved), "only fetches of weights that stayed are gone"


def test_without_overlap_the_program_stays() -> None:
    program = replace(_program(3, update=Update.HELD), overlaps=False)
    assert overlap(program, GENEROUS) is program


def test_with_bytes_to_spare_every_copy_but_the_first_and_last_is_hidden() -> None:
    for update, ends in ((Update.IMMEDIATE, 3), (Update.HELD, 9)):  # a HELD step writes most of its state after the last call
        line = simulate(overlap(_program(4, update=update), GENEROUS))
        assert line.waited_us <= ends * 4
        assert line.moving_us > 10 * 4


def test_without_bytes_to_spare_nothing_takes_more_of_them() -> None:
    program = _program(4, update=Update.IMMEDIATE)
    peak = simulate(program).peak_nbytes
    assert simulate(overlap(program, 0)).peak_nbytes == peak


def test_weights_that_are_needed_again_soon_stay() -> None:
    program = _program(4, update=Update.HELD)
    found = overlap(program, simulate(program).peak_nbytes)
    top = [step.op for step in found.instructions if step.segment == 3 and step.weights and step.op in (Op.FETCH, Op.FREE)]
    assert top == [Op.FETCH, Op.FREE]
    everything = overlap(program, GENEROUS)
    assert sum(step.op is Op.FETCH and bool(step.weights) for step in everything.instructions) == 4


def test_no_update_waits_for_a_write_that_has_just_begun() -> None:
    """Where state fills the room that there is, a part of it is what leaves, beside the next update."""
    program = _program(12, update=Update.HELD, copy_us=50, streamed=False, offloaded=True)
    line = simulate(program)
    assert 3 * 60 < line.peak_nbytes - line.moments[-1].after_nbytes < 6 * 60, "room for the state of a few chunks"
    found = overlap(program, 0).instructions
    behind = []
    for number, step in enumerate(found):
        if step.op is Op.EVICT and step.chunks:
            free = next(i for i, other in enumerate(found) if other.op is Op.FREE and other.chunks == step.chunks)
            behind.append(sum(other.op is Op.UPDATE for other in found[number:free]))
    assert len(behind) == 12
    assert min(behind[:-1]) >= 1, behind


def test_state_is_never_fetched_in_a_forward_or_before_other_micro_batches() -> None:
    found = overlap(replace(_program(3, update=Update.HELD, copy_us=500), accumulating=True), GENEROUS).instructions
    last = max(number for number, step in enumerate(found) if step.op is Op.BACKWARD)
    assert min(number for number, step in enumerate(found) if step.op is Op.FETCH and step.chunks) > last
    found = overlap(_program(3, update=Update.HELD, copy_us=500), GENEROUS).instructions
    first = min(number for number, step in enumerate(found) if step.op is Op.FETCH and step.chunks)
    assert found[first + 1].op in (Op.BACKWARD, Op.FETCH)
    assert any(step.op is Op.BACKWARD for step in found[first:])
    assert not any(step.op is Op.FORWARD for step in found[first:])
