"""One step as a short list of instructions. `simulate` reads it to promise memory; the engine reads it to run.

A *value* is a tensor that instructions pass to each other, a *storage* is the bytes behind one or more values (views share
one). Both are indices. Storages below are those the step itself makes; weights, buffers and inputs are `base_nbytes`.
"""

from dataclasses import dataclass
from enum import StrEnum

from chunkft_compile.planner.problem import Update


class Op(StrEnum):
    """What an instruction does."""

    FETCH = "fetch"  # optimizer state of `chunks`, or values, come from the store
    FORWARD = "forward"
    BACKWARD = "backward"
    FREE = "free"  # values that no call consumed
    UPDATE = "update"  # the optimizer steps `chunks`
    EVICT = "evict"  # optimizer state of `chunks`, or values, go to the store


@dataclass(frozen=True, slots=True)
class Instruction:
    """One move of the engine.

    A call reads the values `reads`, in the order of its arguments, and makes the values `writes`. Those in `frees` are gone
    when it returns: the call holds the only reference to them and drops each at its last use. `transient_nbytes` is the most
    bytes above those live on entry while it runs, its own results included. `starts` are the row offsets of the slices it
    emits. `gradients` pairs a written value with the chunk whose gradient it is; those of an IMMEDIATE update are the gradients it
    applies, and frees. An EVICT reads and frees the values it moves, all those of their storages; a FETCH writes them again.
    """

    op: Op
    segment: int = -1
    code: int = -1
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    gradients: tuple[tuple[int, int], ...] = ()
    chunks: tuple[int, ...] = ()
    transient_nbytes: int = 0
    us: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one step, in order.

    `storage_of[value]` is the storage of a value, -1 where it belongs to `base_nbytes`. `storage_nbytes[storage]` is its size.
    `held` are values the caller keeps for the whole step (the loss). `grad_nbytes` and `state_nbytes` map chunks of the step
    to bytes; with `accumulating`, gradients of earlier micro-batches are there from the start. HELD updates run when the user calls
    `optimizer.step()`, IMMEDIATE ones inside backward.
    """

    instructions: tuple[Instruction, ...]
    base_nbytes: int
    storage_of: tuple[int, ...]
    storage_nbytes: tuple[int, ...]
    held: tuple[int, ...]
    grad_nbytes: dict[int, int]
    state_nbytes: dict[int, int]
    accumulating: bool = False
    update: Update = Update.HELD

    def __post_init__(self) -> None:
        assert not (self.accumulating and self.update is Update.IMMEDIATE), "IMMEDIATE updates keep no gradient to add to"


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory around one instruction: bytes live before it, the most while it runs, and live after it."""

    op: Op
    segment: int
    before_nbytes: int
    peak_nbytes: int
    after_nbytes: int
    us: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What `simulate` promises for one step."""

    moments: tuple[Moment, ...]

    @property
    def peak_nbytes(self) -> int:
        """The most bytes live at any instruction."""
        return max(moment.peak_nbytes for moment in self.moments)

    @property
    def us(self) -> int:
        """Time of all instructions, one after the other."""
        return sum(moment.us for moment in self.moments)

    @property
    def binding(self) -> Moment:
        """The instruction at the peak."""
        return max(self.moments, key=lambda moment: moment.peak_nbytes)


class _Values:
    """The values that are live, and the storages behind them. Sizes are returned, never added up here."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.live: set[int] = set()
        self.uses: dict[int, int] = {}
        self.away: set[int] = set()

    def check_read(self, value: int) -> None:
        assert value in self.live or self.program.storage_of[value] < 0, f"value {value} is read but not live"

    def write(self, value: int) -> int:
        """Bytes that come with a value: none for a view of a live storage or of the base."""
        assert value not in self.live, f"value {value} is written but live already"
        self.live.add(value)
        storage = self.program.storage_of[value]
        if storage < 0:
            return 0
        self.uses[storage] = self.uses.get(storage, 0) + 1
        return self.program.storage_nbytes[storage] if self.uses[storage] == 1 else 0

    def free(self, value: int) -> int:
        """Bytes that go with a value: none while another view of its storage is live."""
        assert value in self.live, f"value {value} is freed but not live"
        assert value not in self.program.held, f"value {value} is freed but the caller holds it"
        self.live.remove(value)
        storage = self.program.storage_of[value]
        if storage < 0:
            return 0
        self.uses[storage] -= 1
        return self.program.storage_nbytes[storage] if self.uses[storage] == 0 else 0

    def evict(self, value: int) -> int:
        """Bytes that go with a value of which the store keeps a copy."""
        assert self.program.storage_of[value] >= 0, f"value {value} is evicted but the step does not own its bytes"
        self.away.add(value)
        return self.free(value)

    def fetch(self, value: int) -> int:
        """Bytes that come back with it."""
        assert value in self.away, f"value {value} is fetched but was not evicted"
        self.away.remove(value)
        return self.write(value)


def simulate(program: Program) -> Timeline:
    """Replay `program` on byte counts.

    Raises `AssertionError` where a value is read or freed that is not there, written while it is there, or freed though the
    caller holds it; where a value is evicted whose bytes stay, or fetched unevicted; where a chunk is updated without a gradient or
    twice; and where state is fetched twice or evicted unfetched.
    """
    values, gradients, fetched = _Values(program), set[int](), set[int]()
    live = program.base_nbytes + (sum(program.grad_nbytes.values()) if program.accumulating else 0)
    moments = []
    for number, step in enumerate(program.instructions):
        before = peak = live
        chunks = set(step.chunks)
        for value in step.reads:
            values.check_read(value)
        match step.op:
            case Op.FORWARD | Op.BACKWARD:
                live += sum(values.write(value) for value in step.writes) - sum(values.free(value) for value in step.frees)
                peak = max(before + step.transient_nbytes, live)
                gradients.update(chunk for _, chunk in step.gradients)
            case Op.FREE:
                live -= sum(values.free(value) for value in step.frees)
            case Op.FETCH:
                assert not fetched & chunks, f"instruction {number} fetches chunks {sorted(fetched & chunks)} again"
                fetched |= chunks
                live += sum(program.state_nbytes[chunk] for chunk in chunks) + sum(values.fetch(value) for value in step.writes)
                peak = live
            case Op.UPDATE:
                assert chunks <= gradients, f"instruction {number} updates chunks {sorted(chunks - gradients)} without a gradient"
                gradients -= chunks
                peak = live + step.transient_nbytes
                live -= sum(values.free(value) for value in step.frees)
            case Op.EVICT:
                assert chunks <= fetched, f"instruction {number} evicts chunks {sorted(chunks - fetched)} it never fetched"
                fetched -= chunks
                live -= sum(program.state_nbytes[chunk] for chunk in chunks) + sum(values.evict(value) for value in step.frees)
                stuck = [v for v in step.frees if values.uses[program.storage_of[v]]]
                assert not stuck, f"instruction {number} evicts values {stuck}, but others keep their bytes"
        moments.append(Moment(step.op, step.segment, before, peak, live, step.us))
    return Timeline(tuple(moments))
