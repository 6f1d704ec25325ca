"""What a `ChunkedModule` shows of the model it wraps to those who look at classes: trainers choose by them, and read what `forward` takes.

Its `__class__` is that of the model, so `isinstance(model, PreTrainedModel)` holds where it did before; `type()` still tells what it is.
"""

import inspect
from typing import Any, TypeVar

from torch import nn

from chunkft_compile.runtime.untraced import untraced

Wrapper = TypeVar("Wrapper", bound=nn.Module)


def showing_forward_of(model: type[nn.Module], wrapper: type[Wrapper]) -> type[Wrapper]:
    """`wrapper`, with a `forward` whose signature is that of the model's, where that can be told."""
    run = wrapper.forward
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return wrapper

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    forward.__doc__ = run.__doc__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    names = {"forward": untraced("the engine of a chunked model runs a program of its own")(forward)}
    return type(wrapper.__name__, (wrapper,), names | {"__module__": wrapper.__module__, "__doc__": wrapper.__doc__})
