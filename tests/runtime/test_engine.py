"""The engine keeps values exactly as long as the program says, adds gradients up, and lets everything go on an error."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from chunkft_compile.planner.program import Instruction, Op, Program, simulate
from chunkft_compile.runtime.engine import Run
from tests.support.allocator import allocator_or_skip

ROWS = 256  # a value is 1 KiB
BATCH = torch.ones(ROWS)

# 0: batch, 1: first activation, 2: loss, 3: its gradient from outside, 4: gradient of chunk 0, 5: gradient passed down
PROGRAM = Program(
    (
        Instruction(Op.FORWARD, 0, 0, reads=(0,), writes=(1,), transient_nbytes=1024),
        Instruction(Op.FORWARD, 1, 1, reads=(1,), writes=(2,), transient_nbytes=4),
        Instruction(Op.BACKWARD, 1, 2, reads=(1, 3), writes=(5, 4), frees=(1,), starts=(7,), gradients=((4, 0),), transient_nbytes=2048),
        Instruction(Op.BACKWARD, 0, 3, reads=(5,), writes=(6,), frees=(5, 6), transient_nbytes=1024),
    ),
    base_nbytes=0,
    storage_of=(-1, 0, 1, -1, 2, 3, 4),
    storage_nbytes=(1024, 4, 1024, 1024, 1024),
    held=(2,),
    grad_nbytes={0: 1024},
    state_nbytes={},
)


class Calls:
    """Four codes that empty their argument lists and note what is alive when they start."""

    def __init__(self) -> None:
        self.seen: dict[str, weakref.ref[torch.Tensor]] = {}
        self.starts: list[int] = []
        self.alive: list[dict[str, bool]] = []

    def _begin(self) -> None:
        self.alive.append({name: reference() is not None for name, reference in self.seen.items()})

    def first(self, args: list[Any]) -> Sequence[torch.Tensor]:
        self._begin()
        (x,) = args
        args.clear()
        made = x * 2
        self.seen["activation"] = weakref.ref(made)
        return (made,)

    def loss(self, args: list[Any]) -> Sequence[torch.Tensor]:
        self._begin()
        made = args.pop().sum()
        return (made,)

    def upper(self, args: list[Any]) -> Sequence[torch.Tensor]:
        self._begin()
        activation, tangent, start = args
        args.clear()
        self.starts.append(start)
        gradient = activation * tangent
        del activation
        self.alive.append({"activation while its last reader runs": self.seen["activation"]() is not None})
        passed = gradient * 3
        self.seen["passed"] = weakref.ref(passed)
        return passed, gradient

    def lower(self, args: list[Any]) -> Sequence[torch.Tensor]:
        self._begin()
        made = args.pop() + 1
        self.alive.append({"passed while its last reader runs": self.seen["passed"]() is not None})
        self.seen["ignored"] = weakref.ref(made)
        return (made,)

    @property
    def list(self) -> list[Any]:
        """In the order of the program's code numbers."""
        return [self.first, self.loss, self.upper, self.lower]


def _run(calls: Calls, leaf: nn.Parameter) -> Run:
    return Run(PROGRAM, calls.list, {0: BATCH}, {0: leaf})


def test_the_program_is_sound() -> None:
    assert simulate(PROGRAM).moments[-1].after_nbytes == 4 + 1024


def test_values_live_as_long_as_the_program_says() -> None:
    calls, leaf = Calls(), nn.Parameter(torch.zeros(ROWS))
    run = _run(calls, leaf)
    held = run.forward()
    assert list(held) == [2]
    assert held[2] == 2 * ROWS
    run.backward({3: torch.tensor(0.5)})
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(ROWS))
    assert calls.starts == [7]
    assert calls.alive == [
        {},
        {"activation": True},
        {"activation": True},  # the backward begins
        {"activation while its last reader runs": False},
        {"activation": False, "passed": True},
        {"passed while its last reader runs": False},
    ]
    assert calls.seen["ignored"]() is None  # written and freed by the same instruction
    assert run.finished


def test_memory_follows_the_simulation() -> None:
    allocator = allocator_or_skip()
    calls, leaf = Calls(), nn.Parameter(torch.zeros(ROWS))
    run, tangent = _run(calls, leaf), torch.tensor(0.5)
    gc.collect()
    before = allocator.live()
    held = run.forward()
    assert allocator.live() - before == simulate(PROGRAM).moments[1].after_nbytes == 1024 + 4
    allocator.reset()
    run.backward({3: tangent})
    timeline = simulate(PROGRAM)
    assert allocator.peak() - before <= timeline.peak_nbytes + 64  # numbers as tensors
    assert allocator.live() - before == timeline.moments[-1].after_nbytes
    assert held


def test_gradients_of_micro_batches_add_up_in_place() -> None:
    leaf = nn.Parameter(torch.zeros(ROWS))
    addresses = []
    for _ in range(3):
        run = _run(Calls(), leaf)
        run.forward()
        run.backward({3: torch.tensor(0.5)})
        assert leaf.grad is not None
        addresses.append(leaf.grad.data_ptr())
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full((ROWS,), 3.0))
    assert len(set(addresses)) == 1


def test_an_error_in_a_backward_lets_everything_go() -> None:
    calls, leaf = Calls(), nn.Parameter(torch.zeros(ROWS))

    def fail(args: list[Any]) -> Sequence[torch.Tensor]:
        raise ValueError("no")

    run = Run(PROGRAM, [calls.first, calls.loss, fail, calls.lower], {0: BATCH}, {0: leaf})
    run.forward()
    with pytest.raises(ValueError, match="no"):
        run.backward({3: torch.tensor(0.5)})
    gc.collect()
    assert calls.seen["activation"]() is None
    assert run.finished


def test_calls_record_no_autograd_graph() -> None:
    weight = nn.Parameter(torch.ones(ROWS))
    run = Run(PROGRAM, Calls().list, {0: weight}, {0: nn.Parameter(torch.zeros(ROWS))})
    assert not run.forward()[2].requires_grad
