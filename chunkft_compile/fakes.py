"""What a call gives on fake tensors."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_value(node: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """The result of a call on the fake values of its arguments; nothing is computed."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with fake_mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
