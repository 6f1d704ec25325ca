"""Whether a model can be trained in chunks, before there is a budget: its segments, and the gradients that no slicing rule reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from chunkft_compile.assembly import Rows, dense_parameters, propagate
from chunkft_compile.capture import capture
from chunkft_compile.lowering import Lowering
from chunkft_compile.segments import cut


@dataclass(frozen=True)
class DenseGradient:
    """A parameter whose gradient is computed whole even if some of its rows are wanted, and the bytes that takes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Examination:
    """What `examine` finds.

    `segments` are (name, kind). `dense` is sorted by bytes, the largest first. `untrained` are trainable parameters that the outputs do
    not depend on: `compile` wants them frozen.
    """

    parameters: int
    trainable: int
    segments: tuple[tuple[str, str], ...]
    dense: tuple[DenseGradient, ...]
    untrained: tuple[str, ...]

    @property
    def kinds(self) -> int:
        """How many segments are different: so many are compiled."""
        return len({kind for _, kind in self.segments})


def examine(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Examination:
    """Capture `model(*args, **kwargs)` and look at every trainable parameter; nothing is trained, and fake tensors do.

    Raises `CaptureError` where the model cannot be one graph.
    """
    found = capture(model, args, kwargs or {})
    lowering = Lowering(found, cut(found))
    sized = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = [
        Rows(name, 0, len(sized[name]) // 2, len(sized[name])) for name in found.gradients if sized[name].dim() and len(sized[name]) > 1
    ]
    chunks = dict(enumerate(rows))
    dense = dense_parameters(lowering, propagate(lowering, chunks, ["save"] * len(lowering.segments)))
    nbytes = {name: sized[name].numel() * sized[name].element_size() for name in dense}
    return Examination(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in sized.values()),
        segments=tuple((segment.name, segment.kind) for segment in lowering.segments),
        dense=tuple(DenseGradient(name, nbytes[name]) for name in sorted(dense, key=lambda name: (-nbytes[name], name))),
        untrained=tuple(sorted(set(sized) - set(found.gradients))),
    )
