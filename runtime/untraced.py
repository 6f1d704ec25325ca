"""What Dynamo keeps out of where it traces the user's code.

Steps of optimizers over chunks inside of a function that is under `torch.compile` are of that kind. It would compile the optimizer
anew for every step of the sweep, because other chunks have a gradient in each, and what it compiles takes other bytes than the plan
counts. A hook cannot end the tracing of the frames that follow it, but those look for Dynamo's callback when they start, and a hook
can take that away until the step is done. After an error it stays away until the compiled function is left, which puts back what was
there before it.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import set_eval_frame  # Private (2.13.0): the callback of this thread; `torch.compiler` has no such call
from torch.optim import Optimizer

Function = TypeVar("Function", bound=Callable[..., Any])

_callbacks: "weakref.WeakKeyDictionary[Optimizer, Any]" = weakref.WeakKeyDictionary()


def untraced(reason: str, *, recursive: bool = True) -> Callable[[Function], Function]:
    """`torch.compiler.disable` with types: the function runs as it is, and with `recursive` all that it calls."""
    made: Callable[[Function], Function] = torch.compiler.disable(recursive=recursive, reason=reason)  # type: ignore[no-untyped-call]
    return made


def pause(optimizer: Optimizer) -> bool:
    """From here to `resume`, frames of this thread run as they are. Whether they did not already."""
    callback = set_eval_frame(None)
    if callback is not None:
        _callbacks[optimizer] = callback
    return callback is not None


def resume(optimizer: Optimizer) -> None:
    """The step is done."""
    callback = _callbacks.pop(optimizer, None)
    if callback is not None:
        set_eval_frame(callback)
