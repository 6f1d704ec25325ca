"""One step of a captured model without planner or optimizer, and training loops that write down which chunks they trained."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

import chunkft_compile
from chunkft_compile.assembly import Assembled, Rows, Update, assemble
from chunkft_compile.capture import Capture
from chunkft_compile.errors import BudgetError
from chunkft_compile.lowering import Lowering
from chunkft_compile.module import ChunkedModule
from chunkft_compile.runtime.chunks import storage_nbytes
from chunkft_compile.runtime.engine import Run
from chunkft_compile.segments import cut
from tests.conftest import Workshop
from tests.models import Case, compute_loss
from tests.support.reference import Slice

Optimizing = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True, eq=False)
class Bench:
    """A captured model with the result and the dense gradients of its first batch."""

    model: nn.Module
    result: torch.Tensor
    leaves: list[torch.Tensor]
    tangents: list[torch.Tensor]
    dense: dict[str, torch.Tensor]
    capture: Capture
    lowering: Lowering
    workshop: Workshop

    @property
    def names(self) -> list[str]:
        """Parameters by name, tied ones once."""
        return list(self.dense)

    def assemble(self, chunks: Mapping[int, Rows], options: Sequence[str]) -> Assembled:
        """The program that trains `chunks`, with no optimizer."""
        nothing = dict.fromkeys(chunks, 0)
        update = Update(((),), (0,), {}, {}, {}, (0,))
        return assemble(
            self.lowering,
            chunks,
            options,
            base_nbytes=0,
            grad_nbytes=nothing,
            costs=self.workshop.costs,
            update=update,
            accumulating=False,
        )

    def gradients(self, chunks: Mapping[int, Rows], options: Sequence[str]) -> dict[int, torch.Tensor | None]:
        """What a run of that program leaves in the chunks' `.grad`."""
        return self.run(chunks, options)[1]

    def run(self, chunks: Mapping[int, Rows], options: Sequence[str]) -> tuple[torch.Tensor, dict[int, torch.Tensor | None]]:
        """The result of a run of that program, and the gradients."""
        assembled = self.assemble(chunks, options)
        found, sources, tangents = self.capture, {}, {}
        for value, node in assembled.bindings.items():
            if node in found.tangents:
                tangents[value] = self.tangents[found.tangents[node]]
            elif node in found.params:
                sources[value] = self.model.get_parameter(found.params[node]).detach()
            elif node in found.buffers:
                sources[value] = self.model.get_buffer(found.buffers[node])
            else:
                sources[value] = self.leaves[found.inputs[node]] if node in found.inputs else found.constants[node]
        weights = {number: self.model.get_parameter(rows.param).detach() for number, rows in chunks.items()}
        leaves = {
            number: nn.Parameter(weight[chunks[number].start : chunks[number].stop] if weight.dim() else weight)
            for number, weight in weights.items()
        }
        run = Run(assembled.program, [code.call for code in assembled.codes], sources, leaves)
        (result,) = run.forward().values()
        result = result.clone()
        run.backward(tangents)
        return result, {number: leaf.grad for number, leaf in leaves.items()}

    def options(self, option: str) -> list[str]:
        """`option` for every segment that has it, "inputs" for the others."""
        return [option if self.lowering.has_option(segment, option) else "inputs" for segment in self.lowering.segments]


@functools.cache
def bench(workshop: Workshop, case: Case) -> Bench:
    """The bench of a case, made once."""
    model = case.build()
    args, kwargs = case.arguments()
    if getattr(getattr(model, "config", None), "use_cache", False) and "bert" not in case.name:
        kwargs = kwargs | {"use_cache": False}
    output = model(*args, **kwargs)
    result = output if isinstance(output, torch.Tensor) else output.loss
    tangent = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    torch.autograd.backward(result, tangent)
    dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = workshop.capture(model, args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return Bench(model, result.detach(), leaves, [tangent], dense, found, workshop.lower(found, cut(found)), workshop)


RESIDENT: dict[str, Any] = {"weights": ["device"]}
"""With some weights away, one step a sweep may be the faster plan, or not: that depends on the machine."""


@functools.cache
def smallest_nbytes(workshop: Workshop, case: Case, *, resident: bool = False) -> int:
    """The smallest budget that a schedule fits, found with small chunks; with all weights on the device if they are `resident`."""
    model = case.build()
    weights = storage_nbytes([*model.parameters(), *model.buffers()])
    budget = weights * 5 // 4
    args, kwargs = case.arguments()
    try:
        compile_quickly(model, budget, **(RESIDENT if resident else {})).plan(*args, **kwargs)
    except BudgetError as error:
        return error.smallest_nbytes
    return budget


def compile_quickly(model: nn.Module, budget: int, **settings: Any) -> ChunkedModule:
    """`compile` that does not wait long for the solver."""
    return chunkft_compile.compile(model, budget, solve_seconds=0.5, **settings)


def slice_of(name: str) -> Slice:
    """`fqn[start:stop]` in parts."""
    match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", name)
    assert match, name
    return match[1], int(match[2]), int(match[3])


@dataclass
class Trained:
    """What a chunked training did: the losses of its micro-batches, the slices of each step, its seeds, the weights at the end."""

    losses: list[float]
    steps: list[list[Slice]]
    seeds: list[list[int]]
    state: dict[str, torch.Tensor]


def train_sweeps(case: Case, model: ChunkedModule, optimizer: Optimizer, *, sweeps: int, micro: int) -> Trained:
    """Train whole sweeps, `micro` batches to a step."""
    done = Trained([], [], [], {})
    while True:
        seeds = [len(done.losses) + i for i in range(micro)]
        for seed in seeds:
            loss = compute_loss(model, case.batch(seed))
            torch.autograd.backward(loss)
            done.losses.append(loss.item())
        progress = model.progress
        done.steps.append([slice_of(name) for name in progress.active])
        done.seeds.append(seeds)
        optimizer.step()
        optimizer.zero_grad()
        if model.progress.sweep >= sweeps:
            done.state = {name: value.clone() for name, value in model.state_dict().items()}
            return done
        assert len(done.steps) < 100, "the sweeps do not end"
