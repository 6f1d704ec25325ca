"""One entry of the zoo, trained in chunks and held against plain autograd."""

import gc
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils import _pytree as pytree

import chunkft_compile
from benchmarks.common import Batch
from benchmarks.zoo.entries import Entry
from chunkft_compile.compiled import model_nbytes
from chunkft_compile.errors import BudgetError, CaptureError, TrainingError
from chunkft_compile.module import ChunkedModule
from chunkft_compile.runtime.allocators import Allocator

LEEWAY = 1.05  # above the smallest budget: tight enough for several steps to a sweep
TOLERANCE = 1e-4
SCALARS_NBYTES = 64  # of the loop: the loss and its gradient
_SEED = 7  # of dropout: the same masks in every forward that is compared
_REFUSALS = (BudgetError, CaptureError, TrainingError, ValueError)


@dataclass(frozen=True)
class Outcome:
    """What came of one entry.

    `refused` is the reason why it cannot be trained, and then nothing else is set. `dense` are split parameters whose gradient is
    computed whole, and cut. `difference` is the largest difference between a gradient and that of autograd, relative to the largest
    element of the parameter's gradient. `untrained` are parameters of which a sweep left rows out or visited some twice, and those
    that an optimizer step left as they were. The peaks are those of the step of the second sweep that came nearest to its prediction;
    they are 0 without an allocator hook.
    """

    name: str
    what: str
    refused: str = ""
    parameters: int = 0
    segments: int = 0
    kinds: int = 0
    chunks: int = 0
    steps: int = 0
    dense: tuple[str, ...] = ()
    difference: float = 0.0
    untrained: tuple[str, ...] = ()
    measured_nbytes: int = 0
    predicted_nbytes: int = 0

    @property
    def works(self) -> bool:
        """Equal gradients, everything trained once a sweep, no step above its prediction."""
        return not self.refused and self.difference <= TOLERANCE and not self.untrained and self.kept

    @property
    def kept(self) -> bool:
        """Whether no step was above its prediction."""
        return self.measured_nbytes <= self.predicted_nbytes + SCALARS_NBYTES


def attempt(entry: Entry, hook: Allocator | None) -> Outcome:
    """Train two sweeps of `entry`: one that changes nothing, to compare gradients, and one that trains, whose bytes a `hook` measures."""
    try:
        return _attempt(entry, hook)
    except _REFUSALS as error:
        return Outcome(entry.name, entry.what, refused=str(error))


def _attempt(entry: Entry, hook: Allocator | None) -> Outcome:
    dense = _dense_gradients(entry, entry.inputs())
    budget_nbytes = round(LEEWAY * _smallest_nbytes(entry, entry.inputs()))
    gc.collect()
    others_nbytes = hook.live() if hook else 0  # dense gradients, and what captures keep that tests share
    plain, batch = entry.model(), entry.inputs()
    model = _compiled(plain, budget_nbytes)
    optimizer = AdamW(model.parameters(), lr=0.0)
    model.plan(**batch)
    problem = model.problem
    assert problem is not None, "a planned model has a problem"
    outcome = Outcome(
        entry.name,
        entry.what,
        parameters=sum(parameter.numel() for parameter in plain.parameters()),
        segments=len(problem.segments),
        kinds=len({segment.kind for segment in problem.segments}),
        chunks=len(model.chunks),
        steps=model.progress.steps,
        dense=model.dense_parameters,
    )
    rows: dict[str, list[int]] = defaultdict(list)
    difference = 0.0
    while model.progress.sweep == 0:
        active = set(model.progress.active)
        torch.manual_seed(_SEED)
        torch.autograd.backward(entry.loss(model(**batch)))
        for chunk in model.chunks:
            if chunk.name in active:
                rows[chunk.param].extend(range(chunk.start, chunk.stop))
                difference = max(difference, _difference(chunk.leaf.grad, dense[chunk.param], chunk.start, chunk.stop))
        optimizer.step()
        optimizer.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    missed = {
        name for name, value in before.items() if name in dense and sorted(rows[name]) != list(range(len(value) if value.dim() else 1))
    }
    optimizer.param_groups[0]["lr"] = 1e-3
    gc.collect()
    peaks = []
    extra = sum(value.nbytes for value in before.values())
    while model.progress.sweep == 1:
        predicted_nbytes = model.progress.predicted_nbytes
        measured_nbytes = _train(entry, model, optimizer, batch, hook)
        peaks.append((measured_nbytes - others_nbytes - extra if hook else 0, predicted_nbytes))
    still = {name for name, parameter in plain.named_parameters() if name in rows and torch.equal(parameter, before[name])}
    nearest = max(peaks, key=lambda peak: peak[0] - peak[1])
    return replace(
        outcome, difference=difference, untrained=tuple(sorted(missed | still)), measured_nbytes=nearest[0], predicted_nbytes=nearest[1]
    )


def _train(entry: Entry, model: nn.Module, optimizer: AdamW, batch: Batch, hook: Allocator | None) -> int:
    """One step; the most bytes in its forward, its backward and its update. What a loss outside the model takes is not the model's."""
    if hook:
        hook.reset()
    output = model(**batch)
    forward_nbytes = hook.peak() if hook else 0
    leaves, spec = pytree.tree_flatten(output)
    results = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    cut = [leaf.detach().requires_grad_() if any(leaf is result for result in results) else leaf for leaf in leaves]
    torch.autograd.backward(entry.loss(pytree.tree_unflatten(cut, spec)))
    gradients = [leaf.grad for leaf in cut if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    del output, leaves, cut
    if hook:
        hook.reset()
    torch.autograd.backward(results, gradients)
    del results, gradients
    optimizer.step()
    optimizer.zero_grad()
    return max(forward_nbytes, hook.peak()) if hook else 0


def _dense_gradients(entry: Entry, batch: Batch) -> dict[str, torch.Tensor]:
    """What autograd gives for every trainable parameter."""
    model = entry.model()
    torch.manual_seed(_SEED)
    torch.autograd.backward(entry.loss(model(**batch)))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _compiled(model: nn.Module, budget_nbytes: int) -> ChunkedModule:
    """Weights stay: with some away, a sweep of one step may fit, and whether it is the faster one depends on the machine."""
    return chunkft_compile.compile(model, budget=budget_nbytes, weights=["device"], solve_seconds=1.0)


def _smallest_nbytes(entry: Entry, batch: Batch) -> int:
    """The smallest budget that a schedule fits."""
    model = entry.model()
    weights_nbytes = model_nbytes(model)
    try:
        _compiled(model, weights_nbytes).plan(**batch)
    except BudgetError as error:
        return error.smallest_nbytes
    return weights_nbytes


def _difference(gradient: torch.Tensor | None, dense: torch.Tensor, start: int, stop: int) -> float:
    expected = dense[start:stop] if dense.dim() else dense
    if gradient is None:
        return float("inf")
    scale = max(float(dense.abs().max()), 1e-6)
    return float((gradient.view_as(expected) - expected).abs().max()) / scale
