"""What the planner is asked and what it answers: a `Problem` of integers in, a `Schedule` out.

Bytes are allocator bytes on the model's device, times are microseconds. Nothing here knows torch.

NOTE [memory of a step]
Segments are `0 .. S-1`, `d` is the depth of the step. The planner bounds every moment of it:

    forward s   base + sum(saved[u] for u < s) + entry[s] + forward_peak[s]
    backward s  base + sum(saved[u] for u <= s) + arriving[s] + gradients(s) + backward_peak[s] + offloaded[s]    for s >= d
    update      HELD: base + all gradients of the step + the largest update_nbytes of its chunks
    update s    IMMEDIATE: base + sum(saved[u] for u < s) + arriving[s-1] (none at d) + gradients(s)
                + the largest update_nbytes of the active chunks with chunk.segment == s                          for s >= d

`base` is `static_nbytes`, less the weights that are not on the device, plus the slab they are fetched into, plus the optimizer
state that stays on the device, plus all gradients of the step when `accumulating` (they are there from the first micro-batch on;
not again in the HELD update). `gradients(s)` are those of active chunks with `chunk.first >= s`; an IMMEDIATE step has applied and
freed those of higher segments, which leaves `chunk.segment <= s <= chunk.first`. When accumulating, all are in `base`, and new
slices come on top until they are added: again those of active chunks with `chunk.segment <= s <= chunk.first`.

The slab holds the largest segment whose weights are away: once, or twice where its link overlaps, to fetch one while the other is in
use. State that is away comes with `update_nbytes`; where its link overlaps, `state_nbytes` is there twice, once for the next chunk.
`update_nbytes` of a chunk whose state stays does not contain that state. Weights are fetched for their update into the slab.

The bound is exact for a chain of segments; where storages are shared between segments it errs upwards, and `simulate` on the
lowered program gives the exact figure.

NOTE [time of a step]
Segment by segment, compute and transfers are added, or where the link overlaps, the longer of the two counts: a segment's transfers
run while its neighbour of the same kind computes.

    forward s   forward_us[s]; fetch its weights if they are away, offload its saved input
    backward s  backward_us[s] + grad_us of the slices it finishes (chunk.segment == s); fetch weights and saved input;
                IMMEDIATE: also update_us, state there and back, and updated weights back to where they live
    update      HELD: update_us of all chunks; state there and back, weights there and back where they are away
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import NamedTuple


class Role(StrEnum):
    """What a segment does in a step."""

    FROZEN = "frozen"  # forward, keep nothing
    PASS = "pass"  # backward for dX only
    ACTIVE = "active"  # dX and gradient slices
    LAST = "last"  # gradient slices, no dX: the depth of the step


class Update(StrEnum):
    """When the gradients of a step are applied."""

    HELD = "held"  # they live until `optimizer.step()`: clipping and accumulation see them
    IMMEDIATE = "immediate"  # inside backward, segment by segment, and freed there


class Placement(StrEnum):
    """Where weights or optimizer state live between uses."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Link:
    """The way between the device and a place beside it.

    `overlaps` says that the engine moves bytes over it while the device computes. `capacity_nbytes` is what the place holds at
    most; None is no limit.
    """

    placement: Placement
    read_bytes_per_s: int
    write_bytes_per_s: int
    capacity_nbytes: int | None = None
    overlaps: bool = False

    def __post_init__(self) -> None:
        if self.placement is Placement.DEVICE or min(self.read_bytes_per_s, self.write_bytes_per_s) <= 0:
            raise ValueError(f"a link leads away from the device at a positive speed, got {self}")
        if self.capacity_nbytes is not None and self.capacity_nbytes < 0:
            raise ValueError(f"the {self.placement} holds {self.capacity_nbytes} bytes")

    def read_us(self, nbytes: int) -> int:
        """Time to bring `nbytes` to the device, rounded up."""
        return -(-nbytes * 1_000_000 // self.read_bytes_per_s)

    def write_us(self, nbytes: int) -> int:
        """Time to take `nbytes` away from it, rounded up."""
        return -(-nbytes * 1_000_000 // self.write_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Cost:
    """One option of one role: what it keeps, what it needs, how long it takes.

    `saved_nbytes` lives on the device from this segment's forward to its backward; `offloaded_nbytes` are away in between.
    `forward_peak_nbytes` and `backward_peak_nbytes` are the most bytes above those live when the call starts; gradient slices are
    not among them.
    """

    option: str
    saved_nbytes: int
    forward_peak_nbytes: int
    backward_peak_nbytes: int
    forward_us: int
    backward_us: int
    offloaded_nbytes: int = 0

    def __post_init__(self) -> None:
        sizes = (self.saved_nbytes, self.forward_peak_nbytes, self.backward_peak_nbytes, self.forward_us, self.backward_us)
        if min(*sizes, self.offloaded_nbytes) < 0:
            raise ValueError(f"option {self.option!r} has a negative cost: {sizes}")


class Demand(NamedTuple):
    """What an option asks of the bytes saved below its segment: it saves some more, and its forward and its backward need so many beside.

    Those of the backward contain what it saves itself. A frozen segment has none.
    """

    cost: Cost
    saved_nbytes: int
    forward_nbytes: int
    backward_nbytes: int


@dataclass(frozen=True)
class Kind:
    """Segments with the same graph share one kind: the options of each role, at least one each, no two of one name."""

    frozen: tuple[Cost, ...]
    passing: tuple[Cost, ...]
    active: tuple[Cost, ...]
    last: tuple[Cost, ...]

    def __post_init__(self) -> None:
        if not (self.frozen and self.passing and self.active and self.last):
            raise ValueError("every role of a kind needs at least one option")
        for role in Role:
            names = [cost.option for cost in self.options(role)]
            if len(set(names)) < len(names):
                raise ValueError(f"two options of the role {role} share a name: {names}")

    @cached_property
    def demands(self) -> Mapping[Role, tuple[Demand, ...]]:
        """The demands of the options of each role; searches ask for them millions of times."""
        return {role: tuple(_demand(cost, role) for cost in self.options(role)) for role in Role}

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The options of all roles."""
        return (*self.frozen, *self.passing, *self.active, *self.last)

    def options(self, role: Role) -> tuple[Cost, ...]:
        """The options of `role`."""
        match role:
            case Role.FROZEN:
                return self.frozen
            case Role.PASS:
                return self.passing
            case Role.ACTIVE:
                return self.active
            case Role.LAST:
                return self.last


def _demand(cost: Cost, role: Role) -> Demand:
    backward = cost.saved_nbytes + cost.backward_peak_nbytes + cost.offloaded_nbytes if role is not Role.FROZEN else -(1 << 62)
    return Demand(cost, cost.saved_nbytes, cost.forward_peak_nbytes, backward)


@dataclass(frozen=True, slots=True)
class Segment:
    """`kind` indexes `Problem.kinds`; `entry_nbytes` arrive from below before forward, `arriving_nbytes` from above before backward.

    `weight_nbytes` are weights that no other segment reads, so they can live elsewhere between its calls.
    """

    name: str
    kind: int
    entry_nbytes: int
    arriving_nbytes: int
    weight_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `[start, stop)` of one parameter, as the planner sees them.

    `segment` is the lowest segment whose backward its gradient needs, `first` the highest one that emits a part of it (they
    differ for tied weights). `update_nbytes` is its optimizer state plus what the optimizer allocates while stepping it,
    `weight_nbytes` what of it moves with the weights of its segment (0 for a weight that several segments read). Where several
    chunks were joined to one, they are still updated one after the other: `joined_state_nbytes` is the largest of their states.
    """

    name: str
    segment: int
    first: int
    grad_nbytes: int
    state_nbytes: int
    update_nbytes: int
    grad_us: int = 0
    update_us: int = 0
    weight_nbytes: int = 0
    joined_state_nbytes: int | None = None

    @property
    def piece_state_nbytes(self) -> int:
        """The state that is on the device while it is updated."""
        return self.state_nbytes if self.joined_state_nbytes is None else self.joined_state_nbytes

    def __post_init__(self) -> None:
        if not 0 <= self.segment <= self.first:
            raise ValueError(f"{self.name}: needs 0 <= segment <= first, got {self.segment} and {self.first}")
        if self.grad_us < 0 or self.update_us < 0 or self.weight_nbytes < 0:
            raise ValueError(f"{self.name}: bad times or weights ({self.grad_us} us, {self.update_us} us, {self.weight_nbytes} bytes)")
        if self.grad_nbytes <= 0 or self.state_nbytes < 0 or self.update_nbytes < self.piece_state_nbytes:
            raise ValueError(
                f"{self.name}: bad sizes (gradient {self.grad_nbytes}, state {self.state_nbytes}, update {self.update_nbytes})"
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything the planner decides on.

    `links` are the ways to HOST and DISK, fastest first; the last has no capacity limit, so that everything has a place. `updates`,
    `state` and `weights` are what a schedule may choose from.
    """

    budget_nbytes: int
    static_nbytes: int
    kinds: tuple[Kind, ...]
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    accumulating: bool = False
    links: tuple[Link, ...] = (Link(Placement.DISK, 1_000_000_000, 1_000_000_000),)
    updates: tuple[Update, ...] = (Update.HELD,)
    state: tuple[Placement, ...] = tuple(Placement)
    weights: tuple[Placement, ...] = (Placement.DEVICE,)

    def __post_init__(self) -> None:
        if self.budget_nbytes <= 0 or self.static_nbytes < 0:
            raise ValueError(f"budget {self.budget_nbytes} and static {self.static_nbytes} must be positive")
        places = [link.placement for link in self.links]
        if not self.links or len(set(places)) < len(places) or self.links[-1].capacity_nbytes is not None:
            raise ValueError(f"links need distinct places, the last one without a capacity limit; got {self.links}")
        if not self.updates or not self.state or not self.weights:
            raise ValueError("updates, state and weights each need at least one choice")
        if self.accumulating and self.updates != (Update.HELD,):
            raise ValueError("gradients that accumulate over micro-batches are HELD: IMMEDIATE updates would apply each one alone")
        if not self.segments or not self.chunks:
            raise ValueError("a problem needs at least one segment and one chunk")
        for segment in self.segments:
            if not 0 <= segment.kind < len(self.kinds):
                raise ValueError(f"{segment.name} is of kind {segment.kind}, there are {len(self.kinds)}")
        for chunk in self.chunks:
            if chunk.first >= len(self.segments):
                raise ValueError(f"{chunk.name} starts in segment {chunk.first}, there are {len(self.segments)}")

    def costs(self, segment: int, role: Role) -> tuple[Cost, ...]:
        """The options of `segment` in `role`."""
        return self.kinds[self.segments[segment].kind].options(role)


@dataclass(frozen=True, slots=True)
class Step:
    """The active chunks (indices into `Problem.chunks`, ascending), the option of every segment, and when updates happen.

    `peak_nbytes` is the bound of the problem until the step is lowered, then the exact figure of `simulate`; `us` is its time.
    """

    chunks: tuple[int, ...]
    options: tuple[str, ...]
    peak_nbytes: int
    us: int
    update: Update = Update.HELD

    def __post_init__(self) -> None:
        if not self.chunks or list(self.chunks) != sorted(set(self.chunks)):
            raise ValueError(f"a step needs ascending, distinct chunks, got {self.chunks}")


@dataclass(frozen=True, slots=True)
class Places:
    """Where optimizer state lives, chunk by chunk, and where weights live, segment by segment, between uses."""

    state: tuple[Placement, ...]
    weights: tuple[Placement, ...]

    @property
    def resident(self) -> tuple[int, ...]:
        """The chunks whose optimizer state stays on the device, ascending."""
        return tuple(index for index, place in enumerate(self.state) if place is Placement.DEVICE)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The planner's answer: one sweep, and where things live.

    `status` is the CP-SAT status by name ("OPTIMAL", "FEASIBLE") or "GREEDY"; `gap` is the relative distance to the proven bound.
    """

    budget_nbytes: int
    steps: tuple[Step, ...]
    places: Places
    status: str
    gap: float
    solve_s: float

    @property
    def resident(self) -> tuple[int, ...]:
        """The chunks whose optimizer state stays on the device, ascending."""
        return self.places.resident

    @property
    def peak_nbytes(self) -> int:
        """The largest peak of its steps."""
        return max(step.peak_nbytes for step in self.steps)

    @property
    def sweep_us(self) -> int:
        """Time of one sweep: every chunk trained once."""
        return sum(step.us for step in self.steps)


class BudgetError(ValueError):
    """No schedule fits. `smallest_nbytes` is the smallest budget that does; `binding` names the instruction that needs it."""

    def __init__(self, message: str, *, smallest_nbytes: int, binding: str) -> None:
        super().__init__(message)
        self.smallest_nbytes = smallest_nbytes
        self.binding = binding

    def __reduce__(self) -> tuple[object, ...]:
        """Between processes the keywords must come along, or reading the error is an error that breaks a pool."""
        return partial(type(self), smallest_nbytes=self.smallest_nbytes, binding=self.binding), self.args


class StepsError(BudgetError):
    """No schedule of so few steps fits. `smallest_nbytes` is the smallest budget without a limit on steps."""
