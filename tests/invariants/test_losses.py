"""Losses whose kernels keep more than their result: plans count it, and chunks are trained as plainly."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.invariants.test_memory import Lab
from tests.models import Case, compute_loss
from tests.support.allocator import Allocator

Loss = Callable[..., torch.Tensor]

LOSSES: dict[str, Loss] = {
    "mse": functional.mse_loss,
    "smooth l1": functional.smooth_l1_loss,
    "smooth l1, beta": lambda x, y, **how: functional.smooth_l1_loss(x, y, beta=0.3, **how),
    "soft margin": lambda x, y, **how: functional.soft_margin_loss(x, 2 * y.round() - 1, **how),
    "binary cross entropy": lambda x, y, **how: functional.binary_cross_entropy(x.sigmoid(), y, **how),
    "binary cross entropy, weighted": lambda x, y, **how: functional.binary_cross_entropy(x.sigmoid(), y, weight=y + 1, **how),
    "huber": functional.huber_loss,  # one that keeps nothing
}


class _Scored(nn.Module):
    """One layer and a loss of what it says."""

    def __init__(self, name: str, reduction: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.loss, self.reduction = LOSSES[name], reduction

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> SequenceClassifierOutput:
        """The loss."""
        return SequenceClassifierOutput(loss=self.loss(self.linear(x), target, reduction=self.reduction))


def _batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(64, 3, generator=generator), "target": torch.rand(64, 5, generator=generator)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_reduced_loss_is_one_element(allocator: Allocator, name: str, reduction: str) -> None:
    case = Case(f"{name} {reduction}", functools.partial(_Scored, name, reduction), _batch)
    lab = Lab(allocator, case, 200.0, make=functools.partial(SGD, lr=0.1))
    for step in lab.sweeps(3):
        assert step.measured <= step.predicted <= 1.02 * step.measured or step.sweep == 0

    plain = case.build()
    optimizer = SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        torch.autograd.backward(compute_loss(plain, lab.batch))
        optimizer.step()
        optimizer.zero_grad()
    for key, value in plain.state_dict().items():
        assert torch.equal(lab.model.state_dict()[key], value), key
