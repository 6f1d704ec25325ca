"""Padding and packing are data, not shapes: one plan gives right results for each of them."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.invariants.harness import compile_quickly
from tests.models import VOCABULARY, bert, compute_loss, llama

pytestmark = pytest.mark.usefixtures("captures_once", "allocator")

TOKENS = 16


def _sequences(lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def _padded(sequences: Sequence[torch.Tensor], *, left: bool) -> dict[str, torch.Tensor]:
    """Rows of TOKENS tokens, of which the mask and the labels leave the pads out."""
    ids = torch.zeros(len(sequences), TOKENS, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        place = slice(TOKENS - len(sequence), TOKENS) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place], labels[row, place] = sequence, 1, sequence
        labels[row, place.start] = -100  # a pad does not predict the first token
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _check(model: nn.Module, loss: torch.Tensor, plain: nn.Module, expected: torch.Tensor) -> None:
    """One step that trains all: the loss and every gradient."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, value in ((model, loss), (plain, expected)):
        one.zero_grad()
        torch.autograd.backward(value)
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        whole = gradients[name.partition("[")[0]].grad
        assert whole is not None
        start, _, stop = name.partition("[")[2].rstrip("]").partition(":")
        rows = whole[int(start) : int(stop)] if whole.dim() else whole
        torch.testing.assert_close(parameter.grad, rows, rtol=0, atol=3e-6 * max(whole.abs().max().item(), 1e-3), msg=name)
    model.zero_grad()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows_give_what_the_rows_alone_give(attention: str, left: bool) -> None:
    torch.manual_seed(0)
    plain = llama(attn_implementation=attention).train()
    model = compile_quickly(copy.deepcopy(plain), 10**6)
    for lengths in ([16, 16], [5, 16], [9, 3]):
        sequences = _sequences(lengths, seed=sum(lengths))
        predicted = [length - 1 for length in lengths]
        losses = [plain(input_ids=ids[None], labels=ids[None]).loss * count for ids, count in zip(sequences, predicted, strict=True)]
        _check(model, compute_loss(model, _padded(sequences, left=left)), plain, torch.stack(losses).sum() / sum(predicted))
    assert model.counts.captures == 1


def test_a_padded_classifier_gives_what_the_rows_alone_give() -> None:
    torch.manual_seed(0)
    plain = bert().train()
    model = compile_quickly(copy.deepcopy(plain), 10**6)
    classes = torch.tensor([2, 0])
    for lengths in ([16, 16], [5, 16], [9, 3]):
        sequences = _sequences(lengths, seed=sum(lengths))
        alone = [plain(input_ids=ids[None], labels=label[None]).loss for ids, label in zip(sequences, classes, strict=True)]
        batch = _padded(sequences, left=False) | {"labels": classes}
        _check(model, compute_loss(model, batch), plain, torch.stack(alone).mean())
    assert model.counts.captures == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_give_what_the_sequences_alone_give(attention: str) -> None:
    """Position ids that begin anew say where a sequence begins; the tokens in a row vary, too."""
    torch.manual_seed(0)
    plain = llama(attn_implementation=attention).train()
    model = compile_quickly(copy.deepcopy(plain), 10**6)
    for lengths in ([16, 8], [6, 10, 8], [5, 7], [12, 9]):
        sequences = _sequences(lengths, seed=len(lengths))
        ids, positions = torch.cat(sequences)[None], torch.cat([torch.arange(length) for length in lengths])[None]
        labels = ids.masked_fill(positions == 0, -100)
        loss = compute_loss(model, {"input_ids": ids, "position_ids": positions, "labels": labels})
        predicted = [length - 1 for length in lengths]
        losses = [plain(input_ids=one[None], labels=one[None]).loss * count for one, count in zip(sequences, predicted, strict=True)]
        _check(model, loss, plain, torch.stack(losses).sum() / sum(predicted))
    assert (model.counts.captures, model.counts.symbolic_captures, model.counts.plans) == (1, 1, 1)
