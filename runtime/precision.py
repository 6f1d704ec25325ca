"""bf16 and fp16 weights whose optimizer computes in fp32: master weights, or stochastic rounding.

The leaf that an optimizer holds is fp32. While its chunk is stepped it has bytes: the master, or a copy of the rows. Between updates it
is a NaN that is expanded to the chunk's shape, so optimizers can be built and loaded, and whoever reads it sees that there is nothing.

NOTE [masters]
A master is a part of the optimizer's state of its chunk, under the key `MASTER`: it moves with that state, and `optimizer.state_dict()`
contains it. During a step it is taken out, because optimizers tell by an empty state that they have to make one. It is made from the
weight at the first update. Where the weight is no longer the rounded master (a checkpoint was loaded, somebody wrote into it), the
master is out of date, and these elements are taken from the weight.

NOTE [stochastic rounding]
bf16 is the upper half of fp32. Add 16 random bits to the lower half, then cut it off: a value rounds up with the probability of its
distance from the lower neighbour, so that updates below half a unit in the last place are right on average. Zamirai, Zhang, Aberger,
De Sa, "Revisiting BFloat16 Training" (2020, arXiv 2010.06192); the same bits as `_fp32_to_bf16_sr` in torchao. Inf and NaN would
change under the addition; they are rounded as torch does.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.optim import Optimizer

from chunkft_compile.runtime.applied import TrainingError
from chunkft_compile.runtime.chunks import Chunk, is_half
from chunkft_compile.runtime.optimizers import step_alone

MASTER = "fp32_master"  # key in the optimizer's state of a chunk; no optimizer of torch has such a one
_PIECE = 2**18  # elements rounded at a time: the temporaries of whole chunks would be a part of the peak
_UPPER_HALF = -0x10000


class Precision(StrEnum):
    """What the optimizer computes with where weights are bf16 or fp16."""

    PLAIN = "plain"  # the dtype of the weights
    MASTER = "master"  # fp32 weights, kept beside them
    STOCHASTIC = "stochastic"  # fp32 copies made for each update and rounded back at random

    def check(self, dtypes: Sequence[torch.dtype]) -> None:
        """Raise `ValueError` unless weights of these dtypes, all that are trained, can be trained so."""
        if self is Precision.PLAIN:
            return
        half = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if is_half(dtype)})
        if not half:
            found = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
            raise ValueError(
                f'precision="{self}" is for bfloat16 or float16 weights, these are {found}; load them so, or leave precision out'
            )
        if self is Precision.STOCHASTIC and half != ["bfloat16"]:
            raise ValueError('precision="stochastic" rounds to bfloat16, and there are weights in float16; choose precision="master"')


def gradient_dtype(weights: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype of `.grad`: that of the weights, but fp32 for fp16, whose small gradients vanish and which `GradScaler` refuses."""
    return torch.float32 if precision is not Precision.PLAIN and weights == torch.float16 else weights


def piece_rows(shape: Sequence[int]) -> int:
    """How many rows of a chunk of this shape are rounded at a time."""
    row = 1
    for size in shape[1:]:
        row *= size
    return max(1, _PIECE // row)


class Rounding:
    """Steps chunks in a precision. `generator` draws the bits of stochastic rounding, and nothing else; None otherwise."""

    def __init__(self, precision: Precision = Precision.PLAIN, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.precision = precision
        self.generator = torch.Generator(device).manual_seed(seed) if precision is Precision.STOCHASTIC else None

    def step(self, optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
        """`step_alone` for chunks, whose `.grad` is afterwards what it was before."""
        wide = self.begin(optimizer, chunks)
        try:
            step_alone(optimizer, [chunk.leaf for chunk in chunks])
        except BaseException:
            wide.abandon()
            raise
        wide.finish()

    def begin(self, optimizer: Optimizer, chunks: Sequence[Chunk]) -> "WideStep":
        """Give the leaves of `chunks` and their gradients fp32 bytes, for a step that somebody else takes.

        Raises `TrainingError` for masters, of another training perhaps, where none are kept: their bytes are not in the plan.
        """
        for chunk in chunks:
            kept = self.precision is Precision.MASTER and chunk.stand_in is not None
            if not kept and MASTER in optimizer.state.get(chunk.leaf, {}):
                raise TrainingError(
                    f'the optimizer\'s state of {chunk.name} has an fp32 master, and precision="{self.precision}" keeps none for '
                    f'{str(chunk.weight.dtype).removeprefix("torch.")} weights; compile(..., precision="master") goes on with it'
                )
        wide = WideStep(self, optimizer, [chunk for chunk in chunks if chunk.stand_in is not None])
        try:
            wide.begin()
        except BaseException:
            wide.abandon()
            raise
        return wide

    def round_into(self, rows: Tensor, wide: Tensor) -> None:
        """Overwrite the weights `rows` by the fp32 values `wide`, which may be used up."""
        if self.generator is None:
            rows.copy_(wide)
            return
        for target, source in _pieces(rows, wide):
            finite = source.isfinite()
            bits = torch.randint(0, 1 << 16, source.shape, dtype=torch.int32, device=source.device, generator=self.generator)
            rounded = bits.add_(source.view(torch.int32)).bitwise_and_(_UPPER_HALF).view(torch.float32)
            target.copy_(torch.where(finite, rounded, source, out=rounded))


class WideStep:
    """One step of one optimizer over `chunks`; ends in `finish`, or in `abandon`, which leaves the weights as they were."""

    def __init__(self, rounding: Rounding, optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
        self._rounding = rounding
        self._optimizer = optimizer
        self._gradients = {chunk: chunk.leaf.grad for chunk in chunks}
        self._kept: set[Chunk] = set()  # had a master before

    @torch.no_grad()
    def begin(self) -> None:
        """fp32 weights first: what a master is checked with is freed before there are gradients."""
        for chunk in self._gradients:
            chunk.leaf.data = self._wide_weights(chunk)
        for chunk, gradient in self._gradients.items():
            chunk.leaf.grad = gradient.float() if gradient is not None else None

    def _wide_weights(self, chunk: Chunk) -> Tensor:
        master: Tensor | None = self._optimizer.state.get(chunk.leaf, {}).get(MASTER)
        if master is None:
            return chunk.rows.float()
        _renew(master, chunk.rows)
        del self._optimizer.state[chunk.leaf][MASTER]
        self._kept.add(chunk)
        return master

    @torch.no_grad()
    def finish(self) -> None:
        """Overwrite the weights. fp32 copies go, masters to the state."""
        self._narrow_gradients()  # before rounding takes bytes of its own
        for chunk in self._gradients:
            self._rounding.round_into(chunk.rows, chunk.leaf.data)
            self._narrow_weights(chunk, keep=self._rounding.precision is Precision.MASTER)

    def abandon(self) -> None:
        """The step ended with an error. The next update finds what it did to a master, see NOTE [masters]."""
        self._narrow_gradients()
        for chunk in self._gradients:
            self._narrow_weights(chunk, keep=chunk in self._kept)

    def _narrow_gradients(self) -> None:
        for chunk, gradient in self._gradients.items():
            chunk.leaf.grad = gradient

    def _narrow_weights(self, chunk: Chunk, *, keep: bool) -> None:
        assert chunk.stand_in is not None
        if keep:
            self._optimizer.state.setdefault(chunk.leaf, {})[MASTER] = chunk.leaf.data
        chunk.leaf.data = chunk.stand_in


def _renew(master: Tensor, rows: Tensor) -> None:
    """Take the weights where they are not the rounded master."""
    for weights, source in _pieces(rows, master):
        same = source.to(weights.dtype) == weights
        torch.where(same, source, weights.float(), out=source)


def _pieces(rows: Tensor, wide: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in the same parts, `piece_rows` at a time."""
    if not rows.dim():
        yield rows, wide
        return
    length = piece_rows(rows.shape)
    yield from zip(torch.split(rows, length), torch.split(wide, length), strict=True)
