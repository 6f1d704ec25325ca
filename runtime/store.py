"""What a store is: a place outside the budgeted memory that tensors are copied to and from while the device computes."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Copy(Protocol):
    """A copy under way. One that is dropped without a `wait` goes on, and its bytes stay until it is done."""

    @property
    def tensor(self) -> torch.Tensor:
        """Its target: the stand-in of a `put`, the tensor on the device of a `get`."""
        ...

    def wait(self) -> torch.Tensor:
        """From here on the current stream (on a CPU, this thread) may use the target, and free or overwrite the source.

        Gives the target. Raises what went wrong with the copy: the source of a `put` that failed is as it was. May be called again.
        """
        ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has gone over the link of a store: bytes of the copies that are done.

    `reading_us` and `writing_us` are microseconds in which at least one copy of that direction was moving bytes, `waiting_us` those
    for which computing stood still in `Copy.wait`.
    """

    read_nbytes: int = 0
    written_nbytes: int = 0
    reading_us: int = 0
    writing_us: int = 0
    waiting_us: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """What two stores have moved, as if one after the other."""
        return Traffic(
            self.read_nbytes + other.read_nbytes,
            self.written_nbytes + other.written_nbytes,
            self.reading_us + other.reading_us,
            self.writing_us + other.writing_us,
            self.waiting_us + other.waiting_us,
        )

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        """What was added since `earlier`."""
        return Traffic(
            self.read_nbytes - earlier.read_nbytes,
            self.written_nbytes - earlier.written_nbytes,
            self.reading_us - earlier.reading_us,
            self.writing_us - earlier.writing_us,
            self.waiting_us - earlier.waiting_us,
        )

    @property
    def hidden(self) -> float:
        """The share of transfer time that computing did not wait for, 0 to 1; 1 where nothing was moved.

        Both directions may move at once: the longer of the two counts, so that it is never too large.
        """
        moving = max(self.reading_us, self.writing_us)
        return max(0.0, 1 - self.waiting_us / moving) if moving else 1.0


class Store(Protocol):
    """Keeps copies of tensors outside the budgeted memory.

    A *slot* is a place with a name; a *stand-in* is a host tensor with the contents of a slot, for those who look at it in between
    (`optimizer.state_dict()`, after `synchronize`). Copies of one slot happen in the order in which they were started.
    """

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What it has moved so far."""
        ...

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> Copy:
        """Start to copy `tensor` to `slot`; the target is the stand-in.

        A slot keeps its place as long as what it is given fits; a new place has at least `room_nbytes`. Raises `OSError` if there
        is no room.
        """
        ...

    def put_into(self, part: torch.Tensor, tensor: torch.Tensor) -> Copy:
        """Start to overwrite `part`, a contiguous view of a stand-in, with the contents of `tensor`; the rest of the slot stays."""
        ...

    def get(self, stand_in: torch.Tensor, device: torch.device) -> Copy:
        """Allocate on `device` now, and start to copy the contents of a stand-in (or of a contiguous view of it) there."""
        ...

    def get_into(self, stand_in: torch.Tensor, target: torch.Tensor) -> Copy:
        """As `get`, into memory that is there already: contiguous, of as many bytes."""
        ...

    def drop(self, slot: object) -> None:
        """Give the place of a slot back, once the copies of it are done. Its stand-ins have no meaning from then on."""
        ...

    def synchronize(self) -> None:
        """Wait until every copy started so far is done, so that the host may read all stand-ins.

        Raises the first error of a copy that no `wait` has raised, or that has left a slot without its contents.
        """
        ...


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def shaped(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first of some single bytes as a contiguous tensor of the shape and dtype of another."""
    return whole[: nbytes_of(like)].view(like.dtype).view(like.shape)


def flat(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The single bytes of a contiguous tensor, without a copy. Raises `ValueError` if it is not contiguous; `what` names it there."""
    if not tensor.is_contiguous():
        raise ValueError(f"{what} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous; make it so first")
    return tensor.detach().view(-1).view(torch.uint8)


def check_sizes(stand_in: torch.Tensor, other: torch.Tensor) -> None:
    """Raises `ValueError` unless both have as many bytes."""
    if nbytes_of(stand_in) != nbytes_of(other):
        raise ValueError(f"a place of {nbytes_of(stand_in)} bytes in the store does not match a tensor of {nbytes_of(other)} bytes")
