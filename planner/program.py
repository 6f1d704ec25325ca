"""One step as a short list of instructions. `simulate` reads it to promise memory and time; the engine reads it to run.

A *value* is a tensor that instructions pass to each other, a *storage* is the bytes behind one or more values (views share
one). Both are indices. Storages below are those the step itself makes; weights that stay on the device, buffers and inputs are
`base_nbytes`.

NOTE [copies and waits]
FETCH and EVICT begin copies, which run one after the other beside the calls where the program `overlaps`, and at once where it does
not. A fetched tensor has its bytes from the FETCH on, and its first reader waits for the copy. What is evicted keeps its bytes until
FREE, which waits for the copy. So every byte comes and goes at an instruction, however fast the copies are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from chunkft_compile.planner.problem import Update


class Op(StrEnum):
    """What an instruction does."""

    FETCH = "fetch"  # optimizer state of `chunks`, weights of the segments `weights`, or values begin to come from the store
    FORWARD = "forward"
    BACKWARD = "backward"
    FREE = "free"  # bytes go: of values that no call consumed, of what was evicted, of fetched weights
    UPDATE = "update"  # the optimizer steps `chunks`
    EVICT = "evict"  # they begin to go to the store


@dataclass(frozen=True, slots=True)
class Instruction:
    """One move of the engine.

    A call reads the values `reads`, in the order of its arguments, and makes the values `writes`. Those in `frees` are gone
    when it returns: the call holds the only reference to them and drops each at its last use. `transient_nbytes` is the most
    bytes above those live on entry while it runs, its own results included. `starts` are the row offsets of the slices it
    emits. `gradients` pairs a written value with the chunk whose gradient it is; those of an IMMEDIATE update are the gradients it
    applies, and frees. An EVICT reads the values it moves, all those of their storages, FREE frees them, and a FETCH writes them again.
    A FETCH of weights writes the values that lie in them, their FREE frees those.
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
    weights: tuple[int, ...] = ()
    transient_nbytes: int = 0
    us: int = 0

    @property
    def moved(self) -> frozenset[tuple[str, int]]:
        """What a FETCH, EVICT or FREE moves, or what an UPDATE needs: ("state", chunk), ("weights", segment), ("value", number)."""
        values = {Op.FETCH: self.writes, Op.EVICT: self.reads, Op.FREE: self.frees}.get(self.op, ())
        named = (("state", self.chunks), ("weights", self.weights), ("value", values if not self.weights else ()))
        return frozenset((what, number) for what, numbers in named for number in numbers)


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one step, in order.

    `storage_of[value]` is the storage of a value, -1 where it belongs to `base_nbytes` or to weights. `storage_nbytes[storage]` is its
    size. `held` are values the caller keeps for the whole step (the loss). `grad_nbytes` and `state_nbytes` map chunks of the step
    to bytes; the state of a HELD chunk whose weights are away contains its rows of them. With `accumulating`, gradients of earlier
    micro-batches are there from the start. HELD updates run when the user calls `optimizer.step()`, IMMEDIATE ones inside backward.
    `weight_nbytes` maps segments whose weights are away to their bytes, `homes` chunks that an IMMEDIATE update changes there to those
    segments. `overlaps`: see NOTE [copies and waits].
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
    weight_nbytes: dict[int, int] = field(default_factory=dict)
    homes: dict[int, int] = field(default_factory=dict)
    overlaps: bool = False

    def __post_init__(self) -> None:
        assert not (self.accumulating and self.update is Update.IMMEDIATE), "IMMEDIATE updates keep no gradient to add to"
        assert not self.homes or self.update is Update.IMMEDIATE, "HELD updates fetch the rows that they change"

    @property
    def backward_starts(self) -> int:
        """The number of the first instruction behind the forward."""
        return 1 + max(number for number, step in enumerate(self.instructions) if step.op is Op.FORWARD)

    @property
    def update_starts(self) -> int:
        """The number of the first instruction that `optimizer.step()` runs; an IMMEDIATE program leaves it nothing."""
        if self.update is Update.IMMEDIATE:
            return len(self.instructions)
        return 1 + max(number for number, step in enumerate(self.instructions) if step.op is not Op.UPDATE and not step.chunks)

    def nbytes_of(self, moved: Iterable[tuple[str, int]]) -> int:
        """Bytes of what a FETCH, EVICT or FREE moves, see `Instruction.moved`."""
        names = list(moved)
        storages = {self.storage_of[number] for what, number in names if what == "value"}
        held = sum(self.storage_nbytes[storage] for storage in storages if storage >= 0)
        state = sum(self.state_nbytes[number] for what, number in names if what == "state")
        return held + state + sum(self.weight_nbytes[number] for what, number in names if what == "weights")


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory around one instruction: bytes live before it, the most while it runs, and live after it.

    `us` is the time until the next one begins, of which `waited_us` are spent on copies.
    """

    op: Op
    segment: int
    before_nbytes: int
    peak_nbytes: int
    after_nbytes: int
    us: int
    waited_us: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """What `simulate` promises for one step. `moving_us` is the time of all its copies."""

    moments: tuple[Moment, ...]
    moving_us: int = 0

    @property
    def peak_nbytes(self) -> int:
        """The most bytes live at any instruction."""
        return max(moment.peak_nbytes for moment in self.moments)

    @property
    def us(self) -> int:
        """Time of the step."""
        return sum(moment.us for moment in self.moments)

    @property
    def waited_us(self) -> int:
        """Time of copies that calls and updates do not hide."""
        return sum(moment.waited_us for moment in self.moments)

    @property
    def binding(self) -> Moment:
        """The instruction at the peak."""
        return max(self.moments, key=lambda moment: moment.peak_nbytes)


class Values:
    """The values that are live, and the storages behind them. Sizes are returned, never added up here."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.live: set[int] = set()
        self.uses: dict[int, int] = {}
        self.leaving: set[int] = set()
        self.away: set[int] = set()
        self.of_weights = {value for step in program.instructions if step.op is Op.FETCH and step.weights for value in step.writes}

    def check_read(self, value: int) -> None:
        based = self.program.storage_of[value] < 0 and value not in self.of_weights
        assert value in self.live or based, f"value {value} is read but not live"

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
        if value in self.leaving:
            self.leaving.remove(value)
            self.away.add(value)
        storage = self.program.storage_of[value]
        if storage < 0:
            return 0
        self.uses[storage] -= 1
        return self.program.storage_nbytes[storage] if self.uses[storage] == 0 else 0

    def evict(self, value: int) -> None:
        """The store begins to take a copy of a value."""
        assert self.program.storage_of[value] >= 0, f"value {value} is evicted but the step does not own its bytes"
        assert value not in self.program.held, f"value {value} is evicted but the caller holds it"
        self.leaving.add(value)

    def fetch(self, value: int) -> int:
        """Bytes that come back with it."""
        assert value in self.away, f"value {value} is fetched but was not evicted"
        self.away.remove(value)
        return self.write(value)


class _Moves:
    """State and weights that are on the device, changed there, or leaving."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.here: set[tuple[str, int]] = set()
        self.changed: set[tuple[str, int]] = set()
        self.leaving: set[tuple[str, int]] = set()

    def fetch(self, names: set[tuple[str, int]], number: int) -> None:
        assert not self.here & names, f"instruction {number} fetches {_listed(self.here & names)} again"
        self.here |= names

    def update(self, chunks: set[int], number: int) -> None:
        moving = {("state", chunk) for chunk in chunks & self.program.state_nbytes.keys()}
        homes = {("weights", self.program.homes[chunk]) for chunk in chunks & self.program.homes.keys()}
        missing = (moving | homes) - self.here
        assert not missing, f"instruction {number} updates chunks {sorted(chunks)} without {_listed(missing)}"
        self.changed |= moving | homes
        self.leaving -= homes

    def evict(self, names: set[tuple[str, int]], number: int) -> None:
        assert names <= self.here, f"instruction {number} evicts {_listed(names - self.here)}, never fetched"
        self.leaving |= names
        self.changed -= names

    def free(self, names: set[tuple[str, int]], number: int) -> None:
        assert names <= self.here, f"instruction {number} frees {_listed(names - self.here)}, never fetched"
        lost = names & self.changed | {name for name in names - self.leaving if name[0] == "state"}
        assert not lost, f"instruction {number} frees {_listed(lost)}, which the store does not have"
        self.here -= names
        self.leaving -= names


def _listed(names: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{what} {number}" for what, number in sorted(names))


class Clock:
    """Time of the instructions so far, and of the copies beside them, which follow each other."""

    def __init__(self, *, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.us = self.waited_us = self.moving_us = 0
        self._link_us = 0  # when the last copy that was begun is complete
        self._done_us: dict[tuple[str, int], int] = {}

    def done_us(self, step: Instruction) -> int:
        """When the copies are complete that an instruction waits for."""
        needs = step.moved | {("value", value) for value in step.reads}
        return max((self._done_us[name] for name in needs if name in self._done_us), default=0)

    def run(self, step: Instruction) -> None:
        """Begin a copy, or wait for copies and let the instruction take its time."""
        copies = step.op in (Op.FETCH, Op.EVICT)
        if copies:
            self._link_us = max(self._link_us, self.us) + step.us
            self.moving_us += step.us
            self._done_us.update(dict.fromkeys(step.moved, self._link_us))
        if not copies or not self.overlaps:
            late_us = max(0, self.done_us(step) - self.us)
            self.waited_us += late_us
            self.us += late_us + (0 if copies else step.us)


def simulate(program: Program) -> Timeline:
    """Replay `program` on byte counts and on a clock.

    Raises `AssertionError` where a value is read or freed that is not there, written while it is there, or freed though the
    caller holds it; where a value is freed whose storage the store has and whose bytes stay, or fetched unevicted; where a chunk is
    updated without a gradient, without its state or weights, or twice; where state or weights are fetched twice, or freed
    unfetched or with changes that the store does not have.
    """
    values, moves, clock, gradients = Values(program), _Moves(program), Clock(overlaps=program.overlaps), set[int]()
    live = program.base_nbytes + (sum(program.grad_nbytes.values()) if program.accumulating else 0)
    moments = []
    for number, step in enumerate(program.instructions):
        before = peak = live
        start_us, waited_us = clock.us, clock.waited_us
        chunks, named = set(step.chunks), {name for name in step.moved if name[0] != "value"}
        for value in step.reads:
            values.check_read(value)
        match step.op:
            case Op.FORWARD | Op.BACKWARD:
                live += sum(values.write(value) for value in step.writes) - sum(values.free(value) for value in step.frees)
                peak = max(before + step.transient_nbytes, live)
                gradients.update(chunk for _, chunk in step.gradients)
            case Op.FREE:
                leaving = [value for value in step.frees if value in values.leaving]
                live -= sum(values.free(value) for value in step.frees)
                stuck = [value for value in leaving if values.uses[program.storage_of[value]]]
                assert not stuck, f"instruction {number} frees values {stuck}, but others keep their bytes"
                moves.free(named, number)
                live -= program.nbytes_of(named)
            case Op.FETCH:
                moves.fetch(named, number)
                bring = values.write if step.weights else values.fetch
                live += program.nbytes_of(named) + sum(bring(value) for value in step.writes)
                peak = live
            case Op.UPDATE:
                assert chunks <= gradients, f"instruction {number} updates chunks {sorted(chunks - gradients)} without a gradient"
                moves.update(chunks, number)
                gradients -= chunks
                peak = live + step.transient_nbytes
                live -= sum(values.free(value) for value in step.frees)
            case Op.EVICT:
                moves.evict(named, number)
                for value in step.reads:
                    values.evict(value)
        clock.run(step)
        moments.append(Moment(step.op, step.segment, before, peak, live, clock.us - start_us, clock.waited_us - waited_us))
    return Timeline(tuple(moments), clock.moving_us)
