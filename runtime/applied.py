"""What stands in `.grad` of a chunk between an IMMEDIATE update and `optimizer.step()`.

The gradient is gone. `None` in its place would let clipping and unscaling pass without effect, so a stand-in without bytes
answers what loops ask of any gradient, and refuses to be computed with.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class TrainingError(RuntimeError):
    """The training loop asks for something a chunked step cannot give (a second backward, an optimizer that misses chunks)."""


# What describes a gradient, and what `zero_grad` does to it. Properties reach `__torch_function__` as their getters.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad", "grad_fn", "is_leaf", "is_sparse")
_DESCRIBES = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.requires_grad_,
    Tensor.__len__,
    Tensor.__hash__,
}


class AppliedGradient(Tensor):
    """Shape, dtype and device of a gradient that was applied and freed inside backward; no bytes."""

    @staticmethod
    def __new__(cls, leaf: Tensor) -> "AppliedGradient":
        # Private (2.13.0), and the only way to a tensor without a storage.
        made: AppliedGradient = Tensor._make_wrapper_subclass(cls, leaf.shape, strides=leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<gradient of shape {tuple(self.shape)}, applied inside backward>"

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DESCRIBES:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func is Tensor.zero_:
            return args[0]
        if func is torch._foreach_zero_:  # `zero_grad(set_to_none=False)` of a foreach or fused optimizer
            rest = [tensor for tensor in args[0] if not isinstance(tensor, AppliedGradient)]
            return torch._foreach_zero_(rest) if rest else None
        getter = func.__name__ == "__get__" if hasattr(func, "__name__") else False
        raise _refusal(getattr(getattr(func, "__self__", func) if getter else func, "__name__", str(func)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise _refusal(str(func))


def _refusal(what: str) -> TrainingError:
    return TrainingError(
        f'{what} on a gradient that update="immediate" has applied and freed inside backward. Clipping, unscaling and reading gradients '
        f'before optimizer.step() need them held: compile(..., update="held")'
    )
