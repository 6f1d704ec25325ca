"""Updates inside backward: bit for bit those of the plain optimizer, seen by nobody else, and sound after an error."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.planner.problem import Placement
from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.applied import AppliedGradient, TrainingError
from chunkft_compile.runtime.chunks import split_parameters
from chunkft_compile.runtime.immediate import Applier
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.stores import Stores
from chunkft_compile.runtime.updates import Updater
from tests.runtime.test_updates import OPTIMIZERS, Make

CPU = torch.device("cpu")
GROUPS = ((3, 2), (1, 0))


class Backward:
    """Four chunks updated in two groups inside a backward, and the same leaves stepped plainly afterwards."""

    def __init__(self, make: Make, directory: Path, resident: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(0)
        self.chunks = split_parameters(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), 10_000)
        self.plain = [nn.Parameter(chunk.leaf.detach().clone()) for chunk in self.chunks]
        self.resident, self.done = resident, list[frozenset[int]]()
        self.stores = Stores(CPU, directory)
        mover = StateMover(self.stores, CPU, lambda chunk: Placement.DISK)
        self.updater = Updater(self.chunks, mover, program=lambda o: [], resident=lambda: resident, done=self.done.append)
        self.optimizers = [make([chunk.leaf for chunk in self.chunks])]
        self.references = [make(self.plain)]

    def run(self, seed: int, optimizers: Sequence[Optimizer] | None = None, numbers: Iterable[int] = range(4)) -> Applier:
        """One backward of random gradients, which the references get in their `.grad`."""
        generator, wanted = torch.Generator().manual_seed(seed), set(numbers)
        made = {n: torch.randn(self.plain[n].shape, generator=generator) for n in range(4)}
        for number in wanted:
            self.plain[number].grad = made[number].clone()
        applier = self.updater.applier(self.optimizers if optimizers is None else optimizers)
        try:
            for group in GROUPS:
                chunks = tuple(n for n in group if n in wanted)
                moving = tuple(n for n in chunks if n not in self.resident)
                applier.execute(Instruction(Op.FETCH, chunks=moving), {})
                gradients = {n: made.pop(n) for n in chunks}
                applier.execute(Instruction(Op.UPDATE, chunks=chunks), gradients)
                assert gradients == {}
                applier.execute(Instruction(Op.EVICT, chunks=moving), {})
                applier.execute(Instruction(Op.FREE, chunks=moving), {})
        except BaseException:
            applier.abandon()
            raise
        applier.finish()
        return applier

    def step(self) -> None:
        """The user's calls."""
        for optimizer in (*self.optimizers, *self.references):
            optimizer.step()
            optimizer.zero_grad()

    def check(self) -> None:
        """Weights are bit for bit those of the plain optimizers."""
        for chunk, leaf in zip(self.chunks, self.plain, strict=True):
            assert torch.equal(chunk.leaf, leaf), chunk.name


@pytest.fixture
def backward(tmp_path: Path) -> Backward:
    return Backward(OPTIMIZERS["adamw"], tmp_path)


@pytest.mark.parametrize("resident", [frozenset(), frozenset({1, 2})], ids=["all moves", "half stays"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_equal_a_plain_step(name: str, resident: frozenset[int], tmp_path: Path) -> None:
    both = Backward(OPTIMIZERS[name], tmp_path, resident)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (*both.optimizers, *both.references)]
    for seed in range(4):
        both.run(seed)
        assert all(isinstance(chunk.leaf.grad, AppliedGradient) for chunk in both.chunks)
        assert both.done == [frozenset(range(4))] * seed
        both.step()
        for schedule in schedules:
            schedule.step()
        both.check()
        assert all(chunk.leaf.grad is None for chunk in both.chunks)
    assert both.done == [frozenset(range(4))] * 4
    mine, wanted = both.optimizers[0].state_dict()["state"], both.references[0].state_dict()["state"]
    for number, values in wanted.items():
        assert all(torch.equal(mine[number][key], value) for key, value in values.items())


def test_two_optimizers_each_update_their_own(backward: Backward) -> None:
    leaves = [chunk.leaf for chunk in backward.chunks]
    backward.optimizers = [OPTIMIZERS["sgd"](leaves[::2]), OPTIMIZERS["adamw"](leaves[1::2])]
    backward.references = [OPTIMIZERS["sgd"](backward.plain[::2]), OPTIMIZERS["adamw"](backward.plain[1::2])]
    for seed in range(3):
        backward.run(seed)
        backward.step()
        backward.check()
    assert backward.done == [{0, 2}, {1, 3}] * 3


def test_one_of_two_optimizers_is_not_stepped(backward: Backward) -> None:
    leaves = [chunk.leaf for chunk in backward.chunks]
    backward.optimizers = [OPTIMIZERS["sgd"](leaves[::2]), OPTIMIZERS["sgd"](leaves[1::2])]
    backward.run(0)
    backward.optimizers[0].step()
    with pytest.raises(TrainingError, match=r"last backward \(0\.bias.*, 2 chunks in all\), and optimizer\.step\(\) was"):
        backward.updater.refuse_unfinished()
    backward.optimizers[1].step()
    backward.updater.refuse_unfinished()


def test_parameters_that_are_no_chunks_are_stepped_once(backward: Backward) -> None:
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    leaves = [chunk.leaf for chunk in backward.chunks]
    backward.optimizers = [torch.optim.SGD([other, *leaves], lr=0.25)]
    backward.run(0)
    assert torch.equal(other, torch.ones(3))
    backward.optimizers[0].step()
    assert torch.equal(other, torch.full((3,), 0.75))


def test_hooks_of_the_user_run_once(backward: Backward) -> None:
    seen: list[str] = []
    backward.optimizers[0].register_step_pre_hook(lambda *_: seen.append("before"))
    backward.optimizers[0].register_step_post_hook(lambda *_: seen.append("after"))
    backward.run(0)
    assert seen == []
    backward.step()
    assert seen == ["before", "after"]


def test_dropping_the_stand_ins_changes_nothing(backward: Backward) -> None:
    backward.run(0)
    backward.optimizers[0].zero_grad()
    with pytest.raises(TrainingError, match=r"optimizer\.step\(\) was not called since"):
        backward.updater.refuse_unfinished()
    backward.step()
    backward.check()
    assert backward.done == [frozenset(range(4))]


def test_a_closure_is_refused(backward: Backward) -> None:
    backward.run(0)
    with pytest.raises(ValueError, match="closure"):
        backward.optimizers[0].step(lambda: 0.0)


def test_another_optimizer_than_the_one_that_updated(backward: Backward) -> None:
    backward.run(0)
    other = torch.optim.SGD([chunk.leaf for chunk in backward.chunks], lr=0.1)
    with pytest.raises(TrainingError, match=r"applied the gradient of 0\.weight\[0:8\] with another optimizer than the SGD whose step"):
        other.step()
    backward.updater.refuse_unfinished()  # they were trained, and training can go on
    assert backward.done == [frozenset(range(4))]
    with pytest.raises(ValueError, match="two optimizers"):
        backward.updater.optimizers()


class _Failing(torch.optim.SGD):
    """Does not step its first parameter before it is told to work."""

    working = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.working and self.param_groups[0]["params"][0].grad is not None:
            raise ArithmeticError("no")
        super().step()


def test_an_error_in_an_update_shows_nothing_half_done(backward: Backward) -> None:
    failing = _Failing([chunk.leaf for chunk in backward.chunks], lr=0.1, momentum=0.9)
    backward.optimizers, backward.references = [failing], [torch.optim.SGD(backward.plain, lr=0.1, momentum=0.9)]
    with pytest.raises(ArithmeticError):
        backward.run(0)
    assert all(chunk.leaf.grad is None for chunk in backward.chunks)
    assert backward.done == []
    backward.updater.recover()
    assert backward.done == [{2, 3}]
    backward.plain[0].grad = backward.plain[1].grad = None
    backward.references[0].step()
    backward.check()
    backward.references[0].zero_grad()
    failing.working = True
    backward.run(0, numbers=(0, 1))
    backward.step()
    backward.check()
    assert backward.done == [{2, 3}, {0, 1}]


def test_state_is_away_after_an_error(backward: Backward) -> None:
    backward.run(0)
    backward.step()
    stored = backward.stores.nbytes
    applier = backward.updater.applier(backward.optimizers)
    applier.execute(Instruction(Op.FETCH, chunks=(3, 2)), {})
    applier.abandon()
    leaf = backward.chunks[3].leaf
    mapped = backward.optimizers[0].state[leaf]["exp_avg"]
    backward.updater.recover()
    assert backward.optimizers[0].state[leaf]["exp_avg"] is not mapped
    assert backward.stores.nbytes == stored
