"""Cyclic slice training in the plainest form: dense autograd, then only the active rows are updated.

What a chunked model must equal. It knows nothing of the package: gradients, accumulation and clipping are torch's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

Slice = tuple[str, int, int]  # name as `named_parameters()` gives it, first row, row after the last
Batch = Mapping[str, torch.Tensor]


def output_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a Hugging Face model."""
    loss: torch.Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _write(slices: Mapping[Slice, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy every slice into its rows of the model."""
    for (name, start, stop), leaf in slices.items():
        parameters[name][start:stop].copy_(leaf)


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Slice]],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    batches: Iterable[Sequence[Batch]],
    *,
    clip_norm: float | None = None,
    compute_loss: Callable[[nn.Module, Batch], torch.Tensor] = output_loss,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train `model` in place; the losses of all micro-batches and the final state dict.

    Each item of `batches` is one optimizer step: its micro-batches, whose gradients are added up. Step i trains `steps[i % len(steps)]`.
    The optimizer gets all slices at once, ordered like the model's parameters.
    """
    parameters = dict(model.named_parameters())  # tied parameters appear once
    order = list(parameters)
    named = sorted({s for step in steps for s in step}, key=lambda s: (order.index(s[0]), s[1]))
    slices = {s: nn.Parameter(parameters[s[0]].detach()[s[1] : s[2]].clone()) for s in named}
    optimizer = make_optimizer(list(slices.values()))
    losses = []
    for i, micro_batches in enumerate(batches):
        for batch in micro_batches:
            loss = compute_loss(model, batch)
            torch.autograd.backward(loss)
            losses.append(loss.item())
        for name, start, stop in steps[i % len(steps)]:
            dense = parameters[name].grad
            slices[name, start, stop].grad = None if dense is None else dense[start:stop].clone()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(slices.values(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        _write(slices, parameters)
    return losses, model.state_dict()
