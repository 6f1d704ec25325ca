"""Optimizers over the parameters of a model, taken over by the chunks of those parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.applied import TrainingError
from chunkft_compile.runtime.chunks import Chunk


def adopt(optimizer: Optimizer, chunks: Iterable[Chunk]) -> None:
    """In the groups of `optimizer`, put the chunks of each parameter in its place, and its state row by row with them.

    Nothing happens where it holds none of these parameters. Raises `TrainingError`, before anything is changed, for state that has no
    rows: it could not be divided exactly.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parts: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        if id(chunk.weight) in held:
            parts[id(chunk.weight)].append(chunk)
    for own in parts.values():
        _check_state(optimizer, own)
    for group in optimizer.param_groups:
        if "param_names" in group:
            pairs = zip(group["params"], group["param_names"], strict=True)
            group["param_names"][:] = [name for parameter, known in pairs for name in _names(known, parts.get(id(parameter), ()))]
        group["params"][:] = [leaf for parameter in group["params"] for leaf in _leaves(parameter, parts.get(id(parameter), ()))]
    for own in parts.values():
        state = optimizer.state.pop(own[0].weight, {})
        for chunk in own if state else ():
            optimizer.state[chunk.leaf] = {key: _rows(value, chunk) for key, value in state.items()}


def _leaves(parameter: nn.Parameter, own: Iterable[Chunk]) -> list[nn.Parameter]:
    return [chunk.leaf for chunk in own] or [parameter]


def _names(known: str, own: Iterable[Chunk]) -> list[str]:
    return [f"{known}[{chunk.start}:{chunk.stop}]" for chunk in own] or [known]


def _check_state(optimizer: Optimizer, own: list[Chunk]) -> None:
    state: Mapping[str, Any] = optimizer.state.get(own[0].weight, {})
    if len(own) == 1 and own[0].stand_in is None:
        return
    for key, value in state.items():
        if own[0].stand_in is not None or (isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != own[0].weight.shape):
            raise TrainingError(
                f"{type(optimizer).__name__} has state {key} for {own[0].param} from before, which cannot be divided among its chunks; "
                f"build the optimizer anew before the first training call"
            )


def _rows(value: Any, chunk: Chunk) -> Any:
    """What a chunk gets of a value of its parameter's state."""
    if not isinstance(value, torch.Tensor) or value.shape != chunk.weight.shape:
        return value.clone() if isinstance(value, torch.Tensor) else value
    return chunk.cut(value).clone()


# What loops do with gradients; anything else gives NaN. It cannot be everything but a few: Dynamo looks at `.grad` when it traces a model.
_READS = {
    torch.linalg.vector_norm,
    torch.norm,
    torch._foreach_norm,
    torch._foreach_mul_,
    torch._foreach_zero_,
    torch._foreach_clamp_min_,
    torch._foreach_clamp_max_,
    *(getattr(torch.Tensor, name) for name in ("norm", "mul_", "div_", "add_", "zero_", "clamp_", "item", "isnan", "isfinite", "abs")),
}


class ChunkedGradient(torch.Tensor):
    """Stands in `.grad` of a parameter whose chunks have the gradients: NaN, the bytes of one element, and no use to clip or read.

    Where `model.zero_grad()` has removed it, the gradients of the chunks are to go too.
    """

    @staticmethod
    def standing_for(weight: torch.Tensor, element: torch.Tensor) -> "ChunkedGradient":
        """A view of `element`, which all stand-ins may share."""
        made: ChunkedGradient = element.expand(weight.shape).as_subclass(ChunkedGradient)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<gradient of shape {tuple(self.shape)}, in the chunks of its parameter>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            raise TrainingError(
                f"{func.__name__} on the gradient of a parameter that is trained in chunks: they have the gradients, and the optimizer has "
                f"the chunks; clip and read those of [p for group in optimizer.param_groups for p in group['params']], and clear them with "
                f"optimizer.zero_grad()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
