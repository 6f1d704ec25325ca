"""How the graphs of one model are captured and compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture, capture_symbolic
from chunkft_compile.compiled import Compiled, Setting, fixed_nbytes
from chunkft_compile.costs import Costs
from chunkft_compile.elsewhere import faked, is_elsewhere
from chunkft_compile.errors import TrainingError
from chunkft_compile.hooks import refuse_hooks
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.garbage import collected_once
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.shallow import capture_shallow
from chunkft_compile.sizes import Symbols
from chunkft_compile.tracing import trace_capture
from chunkft_compile.widening import widen_gradients


class ModelMaker:
    """Makes captures of `model` as if all its weights were on `device`; see `signatures.Maker`.

    `nbytes` are those of the weights, `anchor` is the tensor that connects a step to autograd, which counts as batch. `setting` is
    asked for when the first capture is compiled: only then can the optimizers be there.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        chunks: Sequence[Chunk],
        costs: Costs,
        setting: Callable[[], Setting],
        *,
        nbytes: int,
        anchor: torch.Tensor,
        precision: Precision,
        loss_only: bool,
    ) -> None:
        self._model = model
        self._device = device
        self._chunks = chunks
        self._costs = costs
        self._setting = setting
        self._nbytes = nbytes
        self._anchor = anchor
        self._precision = precision
        self._loss_only = loss_only

    @property
    def modes(self) -> tuple[bool, ...]:
        """See `signatures.Maker`."""
        return tuple(module.training for module in self._model.modules())

    def capture(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
        """See `signatures.Maker`."""
        # what tracing leaves in cycles holds tensors of the batch, which no plan counts
        with collected_once(), self._placed(args, kwargs) as (own_args, own_kwargs):
            found = self._checked(capture_shallow(self._model, own_args, own_kwargs, loss_only=self._loss_only))
        trace_capture(found)
        return found

    def capture_symbolic(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], named: Sequence[Sequence[object]], like: fx.Graph
    ) -> tuple[Capture, Symbols]:
        """See `signatures.Maker`."""
        with collected_once(), self._placed(args, kwargs) as (own_args, own_kwargs):
            found, symbols = capture_symbolic(self._model, own_args, own_kwargs, named, like, loss_only=self._loss_only)
        return self._checked(found), symbols

    def compile(self, capture: Capture, batch: Sequence[torch.Tensor], inputs: tuple[str, ...]) -> Compiled:
        """See `signatures.Maker`."""
        stand_ins = [chunk.stand_in for chunk in self._chunks if chunk.stand_in is not None]
        fixed = fixed_nbytes(self._nbytes, capture, [self._anchor, *batch, *stand_ins])
        return Compiled(capture, fixed, self._costs, self._setting(), inputs)

    @contextmanager
    def _placed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        """Inside, the model can be captured as if all weights were on the device."""
        refuse_hooks(self._model)
        if not is_elsewhere(self._model, self._device):
            yield args, kwargs
            return
        with faked(self._model, self._device, args, kwargs) as batch:
            yield batch

    def _checked(self, found: Capture) -> Capture:
        found = widen_gradients(found, self._precision)
        missing = sorted({chunk.param for chunk in self._chunks} - set(found.gradients))
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TrainingError(
                f"no step would ever train {shown}: the outputs do not depend on it; freeze it before compile() with requires_grad_(False)"
            )
        return found


def check_devices(device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a tensor of a batch that is not on the model's device."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.device != device:
            raise ValueError(
                f"an input of shape {tuple(leaf.shape)} is on {leaf.device}, the model is on {device}; move it: batch.to({str(device)!r})"
            )
