"""The optimizer that `chunkft train` trains with, and that `chunkft plan` plans for."""

from typing import Any

import torch
from torch.optim import Optimizer

from chunkft_compile.runtime.modelled_optimizers import make_optimizer


def build_optimizer(model: Any, *, lr: float, weight_decay: float, name: str | None = None) -> Optimizer:
    """The named optimizer over the chunks; None is AdamW, fused, because its other implementations allocate a copy of what they step."""
    parameters = list(model.parameters())
    if name is None:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=parameters[0].device.type in ("cpu", "cuda"))
    optimizer = make_optimizer(name, parameters)
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=weight_decay)
    return optimizer
