"""What a step of an optimizer costs, against the allocator; which optimizers are found; which are refused."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.optimizers import Layout, measure_optimizer, optimizers_of, step_only
from tests.support.allocator import allocator_or_skip

CPU = torch.device("cpu")
LAYOUTS: list[Layout] = [((96, 40), torch.float32), ((31, 40), torch.float32), ((50,), torch.float32), ((64, 32), torch.bfloat16)]
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw foreach": lambda leaves: torch.optim.AdamW(leaves, foreach=True),
    "adamw fused": lambda leaves: torch.optim.AdamW(leaves, fused=True),
    "adamw amsgrad": lambda leaves: torch.optim.AdamW(leaves, amsgrad=True),
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.1),
    "sgd momentum": lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}
many = pytest.mark.parametrize("name", OPTIMIZERS)


class Counting(Optimizer):
    """Keeps its step count in the group, as some older optimizers do."""

    def __init__(self, leaves: Iterable[nn.Parameter]) -> None:
        super().__init__(leaves, {"lr": 0.1, "step": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1


def _leaf(layout: Layout) -> nn.Parameter:
    leaf = nn.Parameter(torch.randn(layout[0]).to(layout[1]))
    leaf.grad = torch.randn(layout[0]).to(layout[1])
    return leaf


def _measured(make: Callable[[Iterable[nn.Parameter]], Optimizer], layouts: list[Layout]) -> tuple[int, int]:
    """State and transient bytes of a step over these chunks, by the hook."""
    allocator = allocator_or_skip()
    leaves = [_leaf(layout) for layout in layouts]
    gc.collect()
    before = allocator.live()
    optimizer = make(leaves)
    optimizer.step()
    state = allocator.live() - before
    allocator.reset()
    before = allocator.live()
    optimizer.step()
    return state, allocator.peak() - before


@many
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_chunk_costs_what_is_predicted(name: str, layout: Layout) -> None:
    make = OPTIMIZERS[name]
    cost = measure_optimizer(make([nn.Parameter(torch.zeros(3))]), LAYOUTS, CPU).of_layout[layout]
    state, transient = _measured(make, [layout])
    assert abs(cost.state_nbytes + cost.counter_nbytes - state) <= 64
    assert transient <= cost.transient_nbytes <= transient * 1.1 + 400


@many
def test_chunks_stepped_together_stay_below_the_prediction(name: str) -> None:
    make = OPTIMIZERS[name]
    cost = measure_optimizer(make([nn.Parameter(torch.zeros(3))]), LAYOUTS, CPU)
    for group in (LAYOUTS[:2], LAYOUTS[:1] * 3, LAYOUTS[:3]):
        _, transient = _measured(make, group)
        assert transient <= cost.transient_nbytes(group)


@pytest.mark.parametrize("name", ["adamw", "adamw amsgrad"])
def test_large_chunks_stepped_together_do_too(name: str) -> None:
    make = OPTIMIZERS[name]
    large: list[Layout] = [((512, 256), torch.float32)]
    cost = measure_optimizer(make([nn.Parameter(torch.zeros(3))]), large, CPU)
    _, transient = _measured(make, large * 3)
    assert transient <= cost.transient_nbytes(large * 3) <= 1.01 * transient


def test_state_of_adamw_is_two_copies_and_a_counter() -> None:
    cost = measure_optimizer(None, LAYOUTS, CPU).of_layout[LAYOUTS[0]]
    assert (cost.state_nbytes, cost.counter_nbytes) == (2 * 96 * 40 * 4, 4)


def test_time_grows_with_elements_and_is_never_nothing() -> None:
    cost = measure_optimizer(None, LAYOUTS, CPU)
    assert cost.of_layout[LAYOUTS[0]].us >= cost.of_layout[LAYOUTS[1]].us > 0
    assert cost.us(LAYOUTS[:2]) == sum(cost.of_layout[layout].us for layout in LAYOUTS[:2])


def test_measuring_leaves_the_optimizer_alone() -> None:
    leaf = _leaf(LAYOUTS[0])
    optimizer = torch.optim.AdamW([leaf], lr=0.5)
    before = leaf.detach().clone()
    measure_optimizer(optimizer, LAYOUTS, CPU)
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"] == [leaf]
    assert torch.equal(leaf, before)


def test_a_counter_in_the_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Counting counts its steps per parameter group.*Way out"):
        measure_optimizer(Counting([nn.Parameter(torch.zeros(3))]), LAYOUTS, CPU)


def test_the_larger_of_two_optimizers() -> None:
    small = measure_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), LAYOUTS, CPU)
    large = measure_optimizer(None, LAYOUTS, CPU)
    both = small.at_least(large)
    assert both.of_layout[LAYOUTS[0]].state_nbytes == large.of_layout[LAYOUTS[0]].state_nbytes
    assert both.name == "SGD + AdamW (assumed)"


def test_optimizers_are_found_by_what_they_train() -> None:
    leaves = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    mine = torch.optim.SGD(leaves[:2], lr=0.1)
    other = torch.optim.SGD(leaves[2:], lr=0.1)
    assert optimizers_of(leaves[:1]) == [mine]
    assert set(map(id, optimizers_of(leaves))) == {id(mine), id(other)}
    assert optimizers_of([nn.Parameter(torch.zeros(3))]) == []


def test_a_wrapper_stands_back_for_the_optimizer_it_holds() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    wrapper = Wrapper(inner)
    assert optimizers_of(wrapper.param_groups[0]["params"]) == [inner]


def test_step_only_runs_no_hooks() -> None:
    leaf = _leaf(LAYOUTS[0])
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    before = leaf.detach().clone()
    step_only(optimizer)
    assert called == []
    assert not torch.equal(leaf, before)
