"""A capture in a time that does not grow with depth: of equal blocks a few are traced, and the others are copies."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture, Template, capture
from chunkft_compile.errors import CaptureError
from chunkft_compile.likeness import blocks_to_trace
from chunkft_compile.repeating import repeat
from chunkft_compile.stacks import find_stack

logger = logging.getLogger(__name__)


def capture_shallow(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss_only: bool = True) -> Capture:
    """As `capture`, and the same graph. Where blocks are not proven to be equal, all of them are traced."""
    found = _try(model, args, kwargs, loss_only=loss_only)
    if isinstance(found, Capture):
        return found
    logger.debug("every block is traced: %s", found)
    return capture(model, args, kwargs, loss_only=loss_only)


def _try(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss_only: bool) -> Capture | str:
    """The capture, or why there is none."""
    stack = find_stack(model)
    if stack is None:
        return "the model has no stack of equal blocks"
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))

    def wrap(copied: nn.Module) -> nn.Module:
        template = Template(copied, leaves, spec, loss_only=loss_only)
        template.training = copied.training
        return template

    kept = blocks_to_trace(model, wrap, stack, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    if isinstance(kept, str):
        return kept
    try:
        with stack.shortened(kept):
            shallow = capture(model, args, kwargs, loss_only=loss_only, run_on_error=False)  # what it would keep is not for all blocks
    except CaptureError as error:
        return str(error)
    return repeat(shallow, stack, kept)
