"""The reference trainer against plain training, and by hand where the two differ."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tests.support.reference import Batch, Slice, train


class _Tied(nn.Module):
    """Embedding, one hidden layer, and the embedding again as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.hidden(self.embedding(ids))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch)
    return loss


def _batches(steps: int, micro: int) -> list[list[Batch]]:
    return [[{"ids": torch.randint(12, (2, 5)), "labels": torch.randint(12, (2, 5))} for _ in range(micro)] for _ in range(steps)]


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def _halves(model: nn.Module) -> list[Slice]:
    """Every parameter in two slices."""
    return [(name, *rows) for name, p in model.named_parameters() for rows in ((0, len(p) // 2), (len(p) // 2, len(p)))]


def _train_plainly(model: nn.Module, batches: Sequence[Sequence[Batch]], clip_norm: float | None) -> list[float]:
    optimizer, losses = _adamw(list(model.parameters())), []
    for micro_batches in batches:
        for batch in micro_batches:
            loss = _loss(model, batch)
            torch.autograd.backward(loss)
            losses.append(loss.item())
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("clip_norm", [None, 1e9])  # a norm over slices rounds differently, so a clip that acts is tested below
@pytest.mark.parametrize("micro", [1, 3])
def test_one_step_with_everything_is_plain_training(micro: int, clip_norm: float | None) -> None:
    plain = _Tied()
    sliced = deepcopy(plain)
    batches = _batches(4, micro)
    losses, state = train(sliced, [_halves(sliced)], _adamw, batches, clip_norm=clip_norm, compute_loss=_loss)
    assert losses == _train_plainly(plain, batches, clip_norm)
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_a_clip_that_acts_is_plain_training_up_to_rounding() -> None:
    plain = _Tied()
    sliced = deepcopy(plain)
    batches = _batches(4, 1)
    losses, state = train(sliced, [_halves(sliced)], _adamw, batches, clip_norm=0.01, compute_loss=_loss)
    torch.testing.assert_close(losses, _train_plainly(plain, batches, 0.01))
    torch.testing.assert_close(state, plain.state_dict())


def test_only_the_active_rows_of_each_step_move() -> None:
    model = _Tied()
    before = deepcopy(model.state_dict())
    steps: list[list[Slice]] = [[("embedding.weight", 0, 4), ("hidden.bias", 0, 6)], [("hidden.weight", 2, 3)]]
    _, state = train(model, steps, _adamw, _batches(1, 1), compute_loss=_loss)
    moved = {
        name: (state[name] != before[name]).reshape(len(value), -1).any(1).nonzero().flatten().tolist() for name, value in state.items()
    }
    assert moved == {
        "embedding.weight": [0, 1, 2, 3],
        "head.weight": [0, 1, 2, 3],
        "hidden.weight": [],
        "hidden.bias": [0, 1, 2, 3, 4, 5],
    }


def test_a_step_of_two_slices_by_hand() -> None:
    model = _Tied()
    weight = model.hidden.weight.detach().clone()
    (batch,), (other,) = batches = _batches(2, 1)
    gradient = torch.autograd.grad(_loss(model, batch), model.hidden.weight)[0]
    expected = weight.clone()
    expected[0:2] -= 0.5 * gradient[0:2]
    steps: list[list[Slice]] = [[("hidden.weight", 0, 2)], [("hidden.weight", 2, 6)]]
    after_one = deepcopy(model)
    with torch.no_grad():
        after_one.hidden.weight.copy_(expected)
    expected[2:6] -= 0.5 * torch.autograd.grad(_loss(after_one, other), after_one.hidden.weight)[0][2:6]
    _, state = train(model, steps, lambda slices: SGD(slices, lr=0.5), batches, compute_loss=_loss)
    torch.testing.assert_close(state["hidden.weight"], expected, rtol=0, atol=1e-7)
