"""Optimizers as other libraries have them: state in tensor subclasses, in lists, in tables that all parameters share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_LEVELS = 255


class Quantised(torch.Tensor):
    """An 8-bit tensor with one scale per row, by the protocol of torch.compile; it knows no operator."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> "Quantised":
        whole: Quantised = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        whole.codes, whole.scale = codes, scale
        return whole

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> "Quantised":
        return Quantised(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on a quantised tensor")

    @staticmethod
    def of(values: torch.Tensor) -> "Quantised":
        """The nearest that 8 bits can say."""
        scale = values.abs().amax(-1).clamp(min=1e-12)
        codes = (values / scale.unsqueeze(-1) * (_LEVELS // 2)).round().to(torch.int8)
        return Quantised(codes, scale)

    def values(self) -> torch.Tensor:
        """In full precision."""
        return self.codes * self.scale.unsqueeze(-1) / (_LEVELS // 2)


class Momentum(Optimizer):
    """Heavy ball whose momentum is 8-bit, beside a list of two running sums and a table that belongs to the optimizer."""

    def __init__(self, leaves: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(leaves, {"lr": lr})
        self.table = torch.linspace(0.5, 0.9, 64)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is None:
                    continue
                state = self.state[leaf]
                if not state:
                    zeros = torch.zeros_like(leaf)
                    state |= {"step": 0, "momentum": Quantised.of(zeros), "sums": [zeros.clone(), zeros.clone()], "table": self.table}
                state["step"] += 1
                momentum = state["momentum"].values() * state["table"][state["step"] % 64] + leaf.grad
                state["momentum"] = Quantised.of(momentum)
                state["sums"][0] += leaf.grad
                state["sums"][1] += leaf.grad.square()
                leaf -= group["lr"] * (momentum + 0.1 * state["sums"][0] / (1 + state["sums"][1].sqrt()))
