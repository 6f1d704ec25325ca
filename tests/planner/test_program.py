from dataclasses import replace

import pytest

from chunkft_compile.planner.problem import Update
from chunkft_compile.planner.program import Instruction, Op, Program, simulate

# Values: 0 input (base), 1 activation, 2 a view of it, 3 loss, 4 gradient of the activation, 5 slice.
FORWARD = Instruction(Op.FORWARD, segment=0, reads=(0,), writes=(1, 2), transient_nbytes=150, us=3)
LOSS = Instruction(Op.FORWARD, segment=1, reads=(2,), writes=(3,), frees=(2,), transient_nbytes=20, us=1)
HEAD = Instruction(Op.BACKWARD, segment=1, reads=(3,), writes=(4,), transient_nbytes=70, us=2)
BODY = Instruction(Op.BACKWARD, segment=0, reads=(1, 4), writes=(5,), frees=(1, 4), gradients=((5, 7),), transient_nbytes=40, us=5)
FETCH = Instruction(Op.FETCH, chunks=(7,), us=10)
UPDATE = Instruction(Op.UPDATE, chunks=(7,), transient_nbytes=33, us=1)
EVICT = Instruction(Op.EVICT, chunks=(7,), us=10)
LET_GO = Instruction(Op.FREE, chunks=(7,))
PROGRAM = Program(
    instructions=(FORWARD, LOSS, HEAD, BODY, FETCH, UPDATE, EVICT, LET_GO),
    base_nbytes=1000,
    storage_of=(-1, 0, 0, 1, 2, 3),
    storage_nbytes=(100, 4, 60, 30),
    held=(3,),
    grad_nbytes={7: 30},
    state_nbytes={7: 64},
)


def test_every_byte_of_a_small_program() -> None:
    line = simulate(PROGRAM)
    assert [(m.before_nbytes, m.peak_nbytes, m.after_nbytes) for m in line.moments] == [
        (1000, 1150, 1100),  # the view adds nothing
        (1100, 1120, 1104),  # nor does it free anything
        (1104, 1174, 1164),
        (1164, 1204, 1034),  # the slice stays, the loss is held
        (1034, 1098, 1098),
        (1098, 1131, 1098),
        (1098, 1098, 1098),  # the copy begins
        (1098, 1098, 1034),
    ]
    assert (line.peak_nbytes, line.us, line.waited_us, line.moving_us) == (1204, 32, 20, 20)
    assert (line.binding.op, line.binding.segment) == (Op.BACKWARD, 0)


def test_accumulated_gradients_are_there_from_the_start() -> None:
    add = Instruction(Op.FREE, frees=(5,))  # the slice is added to the buffer that is there, and goes
    program = replace(PROGRAM, accumulating=True, instructions=(FORWARD, LOSS, HEAD, BODY, add))
    line = simulate(program)
    assert line.moments[0].before_nbytes == 1030
    assert line.peak_nbytes == 1234
    assert line.moments[-1].after_nbytes == 1034


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((LOSS,), "value 2 is read but not live"),
        ((FORWARD, FORWARD), "value 1 is written but live already"),
        ((FORWARD, replace(LOSS, frees=(2, 3))), "value 3 is freed but the caller holds it"),
        ((Instruction(Op.FREE, frees=(1,)),), "value 1 is freed but not live"),
        ((FETCH, FETCH), "instruction 1 fetches state 7 again"),
        ((UPDATE,), r"instruction 0 updates chunks \[7\] without a gradient"),
        ((FORWARD, LOSS, HEAD, BODY, UPDATE), r"instruction 4 updates chunks \[7\] without state 7"),
        ((EVICT,), "instruction 0 evicts state 7, never fetched"),
        ((LET_GO,), "instruction 0 frees state 7, never fetched"),
        ((FETCH, LET_GO), "instruction 1 frees state 7, which the store does not have"),
        ((FORWARD, LOSS, HEAD, BODY, FETCH, EVICT, UPDATE, LET_GO), "instruction 7 frees state 7, which the store does not have"),
    ],
)
def test_impossible_programs_are_refused(instructions: tuple[Instruction, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        simulate(replace(PROGRAM, instructions=instructions))


# The activation (values 1 and 2, one storage) waits in the store between forward and backward of segment 0.
PUT = Instruction(Op.EVICT, segment=0, reads=(1,), us=7)
GONE = Instruction(Op.FREE, segment=0, frees=(1,))
GET = Instruction(Op.FETCH, segment=0, writes=(1,), us=8)


def test_values_that_wait_in_the_store_take_no_bytes() -> None:
    line = simulate(replace(PROGRAM, instructions=(FORWARD, LOSS, PUT, GONE, HEAD, GET, BODY)))
    assert [(m.before_nbytes, m.peak_nbytes, m.after_nbytes) for m in line.moments] == [
        (1000, 1150, 1100),
        (1100, 1120, 1104),
        (1104, 1104, 1104),
        (1104, 1104, 1004),
        (1004, 1074, 1064),
        (1064, 1164, 1164),
        (1164, 1204, 1034),
    ]


def test_an_immediate_update_frees_the_gradients_it_applies() -> None:
    apply = replace(UPDATE, gradients=((5, 7),), frees=(5,))
    program = replace(PROGRAM, instructions=(FORWARD, LOSS, HEAD, BODY, FETCH, apply, EVICT, LET_GO), update=Update.IMMEDIATE)
    line = simulate(program)
    assert [(m.before_nbytes, m.peak_nbytes, m.after_nbytes) for m in line.moments[4:]] == [
        (1034, 1098, 1098),
        (1098, 1131, 1068),
        (1068, 1068, 1068),
        (1068, 1068, 1004),
    ]
    with pytest.raises(AssertionError, match=r"instruction 6 updates chunks \[7\] without a gradient"):
        simulate(replace(program, instructions=(FORWARD, LOSS, HEAD, BODY, FETCH, apply, UPDATE)))
    with pytest.raises(AssertionError, match="IMMEDIATE updates keep no gradient to add to"):
        replace(program, accumulating=True)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((FORWARD, PUT, GONE), r"instruction 2 frees values \[1\], but others keep their bytes"),  # the view is live
        ((FORWARD, LOSS, PUT, GONE, HEAD, BODY), "value 1 is read but not live"),
        ((FORWARD, LOSS, GET), "value 1 is fetched but was not evicted"),
        ((FORWARD, LOSS, replace(PUT, reads=(3,))), "value 3 is evicted but the caller holds it"),
        ((replace(PUT, reads=(0,)),), "value 0 is evicted but the step does not own its bytes"),
    ],
)
def test_impossible_moves_are_refused(instructions: tuple[Instruction, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        simulate(replace(PROGRAM, instructions=instructions))
