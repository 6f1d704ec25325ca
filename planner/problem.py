"""What the planner is asked and what it answers: a `Problem` of integers in, a `Schedule` out.

Bytes are allocator bytes on the model's device, times are microseconds. Nothing here knows torch.

The memory of one step, as the planner bounds it (segments `0 .. S-1`, `d` the depth of the step):

    forward s   base + sum(saved[u] for u < s) + entry[s] + forward_peak[s]
    backward s  base + sum(saved[u] for u <= s) + arriving[s] + gradients(s) + backward_peak[s]      for s >= d
    update      static + all gradients of the step + the largest update_nbytes of its chunks

`base` is `static_nbytes`, plus all gradients of the step when `accumulating` (they are there from the first micro-batch on).
`gradients(s)` are those of active chunks with `chunk.first >= s`; when accumulating they are already in `base`, and new
slices come on top until they are added: those of active chunks with `chunk.segment <= s <= chunk.first`. The bound is exact
for a chain of segments; where storages are shared between segments it errs upwards, and `simulate` on the lowered program
gives the exact figure.
"""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a segment does in a step."""

    FROZEN = "frozen"  # forward, keep nothing
    PASS = "pass"  # backward for dX only
    ACTIVE = "active"  # dX and gradient slices
    LAST = "last"  # gradient slices, no dX: the depth of the step


@dataclass(frozen=True, slots=True)
class Cost:
    """One option of one role: what it keeps, what it needs, how long it takes.

    `saved_nbytes` lives from this segment's forward to its backward. `forward_peak_nbytes` and `backward_peak_nbytes` are the
    most bytes above those live when the call starts; gradient slices are not among them.
    """

    option: str
    saved_nbytes: int
    forward_peak_nbytes: int
    backward_peak_nbytes: int
    forward_us: int
    backward_us: int

    def __post_init__(self) -> None:
        sizes = (self.saved_nbytes, self.forward_peak_nbytes, self.backward_peak_nbytes, self.forward_us, self.backward_us)
        if min(sizes) < 0:
            raise ValueError(f"option {self.option!r} has a negative cost: {sizes}")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Segment:
    """`kind` indexes `Problem.kinds`; `entry_nbytes` arrive from below before forward, `arriving_nbytes` from above before backward."""

    name: str
    kind: int
    entry_nbytes: int
    arriving_nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `[start, stop)` of one parameter, as the planner sees them.

    `segment` is the lowest segment whose backward its gradient needs, `first` the highest one that emits a part of it (they
    differ for tied weights). `update_nbytes` is its optimizer state plus what the optimizer allocates while stepping it.
    """

    name: str
    segment: int
    first: int
    grad_nbytes: int
    state_nbytes: int
    update_nbytes: int
    grad_us: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.segment <= self.first:
            raise ValueError(f"{self.name}: needs 0 <= segment <= first, got {self.segment} and {self.first}")
        if self.grad_nbytes <= 0 or self.state_nbytes < 0 or self.update_nbytes < self.state_nbytes or self.grad_us < 0:
            raise ValueError(
                f"{self.name}: bad sizes (gradient {self.grad_nbytes}, state {self.state_nbytes}, update {self.update_nbytes})"
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything the planner decides on. `link_bytes_per_s` is the speed of the store that holds inactive optimizer state."""

    budget_nbytes: int
    static_nbytes: int
    kinds: tuple[Kind, ...]
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    accumulating: bool = False
    link_bytes_per_s: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.budget_nbytes <= 0 or self.static_nbytes < 0 or self.link_bytes_per_s <= 0:
            raise ValueError(f"budget {self.budget_nbytes}, static {self.static_nbytes} and link {self.link_bytes_per_s} must be positive")
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
    """The active chunks (indices into `Problem.chunks`, ascending) and the option of every segment.

    `peak_nbytes` is the bound of the problem until the step is lowered, then the exact figure of `simulate`; `us` is its time.
    """

    chunks: tuple[int, ...]
    options: tuple[str, ...]
    peak_nbytes: int
    us: int

    def __post_init__(self) -> None:
        if not self.chunks or list(self.chunks) != sorted(set(self.chunks)):
            raise ValueError(f"a step needs ascending, distinct chunks, got {self.chunks}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """The planner's answer: one sweep.

    `resident` are the chunks whose optimizer state stays on the device between their steps; all other state is in the store.
    `status` is the CP-SAT status by name ("OPTIMAL", "FEASIBLE") or "GREEDY"; `gap` is the relative distance to the proven bound.
    """

    budget_nbytes: int
    steps: tuple[Step, ...]
    resident: tuple[int, ...]
    status: str
    gap: float
    solve_s: float

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
