"""What the weights of a model are called."""

import torch
from torch import nn


def named_once(model: nn.Module) -> list[tuple[torch.Tensor, list[str]]]:
    """Every parameter and buffer once, with all names it has: tied ones have several, the one that torch lists them under first."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(found.values())
