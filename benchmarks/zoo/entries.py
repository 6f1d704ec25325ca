"""What an entry of the zoo is: a tiny model of one architecture with random weights, a batch, and how a loss comes of its outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import Batch

LAYERS, HIDDEN, HEADS, WIDE = 3, 32, 4, 64
"""Blocks, width, attention heads and width of the MLP, wherever an architecture has them."""

VOCABULARY, ROWS, TOKENS = 96, 2, 12
CLASSES, PIXELS = 5, 32

Loss = Callable[[Any], torch.Tensor]


def own_loss(output: Any) -> torch.Tensor:
    """The loss that a model of transformers computes from its labels."""
    loss: torch.Tensor = output.loss
    return loss


@dataclass(frozen=True)
class Entry:
    """One architecture. `build` makes the model, `batch` what it is called with, `loss` a scalar of what it returns.

    `what` says what is particular about it for slicing gradients.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Loss = own_loss

    def model(self) -> nn.Module:
        """The model in training mode, the same weights every time."""
        torch.manual_seed(0)
        model = self.build().train()
        for parameter in model.parameters():
            # Every row must get a gradient, so that a sweep can be seen to change it; initial zeros (adapters) hide some.
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def inputs(self) -> Batch:
        """Its batch, the same every time."""
        torch.manual_seed(1)
        return self.batch()


def text(rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Tokens to predict: [rows, tokens]."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    return {"input_ids": ids, "labels": ids.clone()}


def padded_text() -> Batch:
    """Tokens of two lengths with their mask."""
    attended = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 4]])).long()
    return text() | {"attention_mask": attended}


def padded_classes() -> Batch:
    """Tokens of two lengths with a class for each row."""
    batch = padded_text()
    return batch | {"labels": torch.randint(2, (ROWS,))}


def images(classes: int = CLASSES) -> Batch:
    """Images and their classes."""
    return {"pixel_values": torch.randn(ROWS, 3, PIXELS, PIXELS), "labels": torch.randint(classes, (ROWS,))}
