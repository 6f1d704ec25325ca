"""Optimizers that would train chunks otherwise than whole parameters, or not train them at all, are refused before they do."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.optimizers import probe_of, step_only


def refuse_unsupported(optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
    """Raise `TypeError` if `optimizer` cannot train `chunks`, with the chunk, the reason and the way out."""
    _refuse_parts_of_matrices(optimizer, chunks)
    _refuse_overrides(optimizer, chunks)
    _refuse_replaced_data(optimizer, chunks)


def warn_of_lost_decay(optimizer: Optimizer) -> None:
    """Say where a parameter group that decays is empty and another one does not: names of parameters are not those of chunks."""
    rates = [group.get("weight_decay") for group in optimizer.param_groups if not group["params"]]
    if rate := next(filter(None, rates), None):
        warnings.warn(
            f"the group of {type(optimizer).__name__} with weight_decay={rate:g} is empty, so nothing is decayed. Chunks are named "
            f"fqn[start:stop] in named_parameters(): choose by the name before the bracket. Under the Trainer of transformers, "
            f"chunkft_compile.integrations.transformers does",
            stacklevel=2,
        )


def _refuse_parts_of_matrices(optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
    part = next((chunk for chunk in chunks if chunk.stop - chunk.start < chunk.size), None)
    if isinstance(optimizer, torch.optim.Muon) and part is not None:
        raise TypeError(
            f"{type(optimizer).__name__} orthogonalises whole matrices, and {part.name} is a part of one of {part.size} rows. Way out: an "
            f"elementwise optimizer for it (AdamW), or a larger budget: a chunk is at most 1/24 of what the weights leave of it"
        )


def _refuse_overrides(optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
    """bitsandbytes keeps settings of single parameters in a manager (0.50.2), by their identity: chunks are other tensors."""
    manager = getattr(optimizer, "mng", None)
    by_id = getattr(manager, "pid2config", {})
    of_modules = {id(getattr(module, name)): config for module, name, config in getattr(manager, "module_weight_config_triple", ())}
    for chunk in chunks:
        config = by_id.get(id(chunk.leaf)) or of_modules.get(id(chunk.weight))
        if config:
            raise TypeError(
                f"bitsandbytes overrides {config} for {chunk.param}, and chunks share the settings of their group. Way out: a second "
                f"optimizer for that parameter, built without an override (the Trainer makes one for embeddings: give it your optimizer)"
            )


def _refuse_replaced_data(optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
    """A step that replaces `leaf.data` by a contiguous copy (bitsandbytes) would train the copy and not the weight."""
    scattered = next((chunk for chunk in chunks if not chunk.leaf.is_contiguous()), None)
    if scattered is None:
        return
    leaf = nn.Parameter(torch.zeros(2, 2, dtype=scattered.leaf.dtype, device=scattered.leaf.device).t())
    leaf.grad = torch.zeros_like(leaf)
    before = leaf.data_ptr()
    step_only(probe_of(optimizer, [leaf]))
    if leaf.data_ptr() != before:
        raise TypeError(
            f"{type(optimizer).__name__} copies weights that are not contiguous, and would train a copy of {scattered.name}. Way out: "
            f"weight.data = weight.data.contiguous() before compile(), or torch.optim.AdamW"
        )
