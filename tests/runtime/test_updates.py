"""A step that goes group by group equals one plain step, runs the user's hooks once, and says what it cannot do."""

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from chunkft_compile.planner.problem import Placement
from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.chunks import Chunk, split_parameters
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.stores import Stores
from chunkft_compile.runtime.updates import Updater

Make = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=0.1),
    "adamw foreach": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, foreach=True),
    "adamw fused": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, fused=True),
    "adamw amsgrad": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, amsgrad=True),
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9),
    "adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=0.1),
    "rmsprop": lambda leaves: torch.optim.RMSprop(leaves, lr=0.1),
    "adafactor": lambda leaves: torch.optim.Adafactor(leaves, lr=0.1),
    "nadam": lambda leaves: torch.optim.NAdam(leaves, lr=0.1),
}


CPU = torch.device("cpu")


class Training:
    """Four chunks stepped in two groups, and the same leaves stepped plainly."""

    def __init__(self, make: Make, directory: Path | None = None, resident: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
        self.chunks: tuple[Chunk, ...] = split_parameters(model, 10_000)
        self.plain = [nn.Parameter(chunk.leaf.detach().clone()) for chunk in self.chunks]
        self.done: list[frozenset[int]] = []
        self.stores = Stores(CPU, directory)
        mover = StateMover(self.stores, CPU, lambda chunk: Placement.DISK)
        self.updater = Updater(
            self.chunks, mover, program=lambda o: self._program(resident), resident=lambda: resident, done=self.done.append
        )
        self.optimizer = make([chunk.leaf for chunk in self.chunks])
        self.reference = make(self.plain)

    def _program(self, resident: frozenset[int]) -> list[Instruction]:
        made = []
        for group in ((0, 1), (2, 3)):
            moving = tuple(number for number in group if number not in resident)
            made += [Instruction(op, chunks=group if op is Op.UPDATE else moving) for op in (Op.FETCH, Op.UPDATE, Op.EVICT, Op.FREE)]
        return made

    def give_gradients(self, seed: int, numbers: Iterable[int] = range(4)) -> None:
        """The same random gradients for both."""
        generator = torch.Generator().manual_seed(seed)
        for number in numbers:
            gradient = torch.randn(self.plain[number].shape, generator=generator)
            self.chunks[number].leaf.grad, self.plain[number].grad = gradient, gradient.clone()

    def check(self) -> None:
        """Weights are bit for bit those of the plain optimizer."""
        for chunk, leaf in zip(self.chunks, self.plain, strict=True):
            assert torch.equal(chunk.leaf, leaf), chunk.name


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(OPTIMIZERS["adamw"], tmp_path)


@pytest.mark.parametrize("resident", [frozenset(), frozenset({1, 2})], ids=["all moves", "half stays"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_streamed_step_equals_a_plain_one(name: str, resident: frozenset[int], tmp_path: Path) -> None:
    both = Training(OPTIMIZERS[name], tmp_path, resident)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (both.optimizer, both.reference)]  # wraps step()
    for seed in range(4):
        both.give_gradients(seed)
        for optimizer in (both.optimizer, both.reference):
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        both.check()
    assert both.done == [frozenset(range(4))] * 4


def test_chunks_without_a_gradient_are_left_alone(training: Training) -> None:
    for seed, numbers in enumerate([(0, 3), (1,), (0, 1, 2)]):
        training.give_gradients(seed, numbers)
        for optimizer in (training.optimizer, training.reference):
            optimizer.step()
            optimizer.zero_grad()
    training.check()
    assert training.done == [{0, 3}, {1}, {0, 1, 2}]


def test_inactive_state_is_in_the_store_and_visible(training: Training) -> None:
    for seed in range(2):
        training.give_gradients(seed)
        training.optimizer.step()
        training.reference.step()
    assert training.stores.nbytes > 0
    mine, wanted = training.optimizer.state_dict()["state"], training.reference.state_dict()["state"]
    for number, values in wanted.items():
        assert all(torch.equal(mine[number][key], value) for key, value in values.items())


def test_loaded_state_is_used(training: Training, tmp_path: Path) -> None:
    training.give_gradients(0)
    training.optimizer.step()
    training.reference.step()
    again = Training(OPTIMIZERS["adamw"], tmp_path)
    for chunk, leaf, source in zip(again.chunks, again.plain, training.plain, strict=True):
        chunk.leaf.data.copy_(source)
        leaf.data.copy_(source)
    again.optimizer.load_state_dict(training.optimizer.state_dict())
    again.reference.load_state_dict(training.reference.state_dict())
    again.give_gradients(1)
    again.optimizer.step()
    again.reference.step()
    again.check()


def test_hooks_of_the_user_run_once_and_see_all_gradients_afterwards(training: Training) -> None:
    seen: list[str] = []
    training.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    training.give_gradients(0)
    training.optimizer.step()
    assert seen == ["before", "after"]
    assert all(chunk.leaf.grad is not None for chunk in training.chunks)


def test_another_model_may_be_collected_during_a_step(training: Training, tmp_path: Path) -> None:
    others: list[Training] = []

    def collect(*_: object) -> None:
        others.clear()
        gc.collect()

    training.give_gradients(0)
    handle = register_optimizer_step_pre_hook(collect)  # while torch goes through all global hooks, with more behind it
    others.append(Training(OPTIMIZERS["sgd"], tmp_path))
    try:
        training.optimizer.step()
    finally:
        handle.remove()
    training.reference.step()
    training.check()


def test_a_closure_is_refused(training: Training) -> None:
    training.give_gradients(0)
    with pytest.raises(ValueError, match="closure"):
        training.optimizer.step(lambda: 0.0)


def test_an_error_in_step_leaves_the_gradients_to_be_seen(training: Training) -> None:
    training.give_gradients(0)
    before = [chunk.leaf.grad for chunk in training.chunks]
    training.optimizer.param_groups[0]["betas"] = None  # something inside step breaks
    with pytest.raises(TypeError):
        training.optimizer.step()
    assert all(chunk.leaf.grad is gradient for chunk, gradient in zip(training.chunks, before, strict=True))
    assert training.done == []


def test_a_chunk_in_no_optimizer_is_named(training: Training) -> None:
    training.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"AdamW misses 1\.bias\[0:6\]: they would never be trained"):
        training.updater.check_coverage()


def test_a_chunk_in_two_optimizers_is_refused(training: Training) -> None:
    second = torch.optim.SGD([training.chunks[0].leaf], lr=0.1)
    with pytest.raises(ValueError, match=r"two optimizers .* train 0\.weight\[0:8\]"):
        training.updater.check_coverage()
    del second


def test_other_optimizers_are_none_of_its_business(training: Training) -> None:
    leaf = nn.Parameter(torch.ones(3))
    leaf.grad = torch.ones(3)
    torch.optim.SGD([leaf], lr=0.5).step()
    assert torch.equal(leaf, torch.full((3,), 0.5))
    assert training.done == []


def test_parameters_that_are_no_chunks_are_stepped_once(training: Training) -> None:
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    training.optimizer = torch.optim.SGD([other, *(chunk.leaf for chunk in training.chunks)], lr=0.25)
    training.give_gradients(0)
    training.optimizer.step()
    assert torch.equal(other, torch.full((3,), 0.75))
    assert torch.equal(other.grad, torch.ones(3))
    assert training.done == [frozenset(range(4))]


class _Calling(torch.optim.SGD):
    """Its step calls that of its base, around which torch runs the hooks once more."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


def test_a_step_that_calls_its_base_is_one_step(training: Training) -> None:
    training.optimizer = _Calling([chunk.leaf for chunk in training.chunks], lr=0.1, momentum=0.9)
    training.reference = torch.optim.SGD(training.plain, lr=0.1, momentum=0.9)
    for seed in range(3):
        training.give_gradients(seed)
        for optimizer in (training.optimizer, training.reference):
            optimizer.step()
            optimizer.zero_grad()
        training.check()
    assert frozenset().union(*training.done[:2]) == frozenset(range(4))
