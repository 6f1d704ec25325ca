"""The guard on scripted readings: what is compared, what is left out, and what a broken promise is told."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from chunkft_compile.planner.program import Instruction, Op, Program, Timeline, simulate
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.runtime import guard as guards
from chunkft_compile.runtime.allocators import install
from chunkft_compile.runtime.gauges import AcceleratorGauge, CpuGauge, Reading
from chunkft_compile.runtime.guard import Guard, MemoryPromiseError, Watch, open_guard
from chunkft_compile.runtime.native import BuildError
from chunkft_compile.runtime.step_log import StepLog
from tests.support.allocator import Allocator

# base 1000; a forward saves 100 and takes 300, a backward makes a gradient of 50 and frees the 100, two chunks of state 40 each are stepped
PROGRAM = Program(
    (
        Instruction(Op.FORWARD, 0, 0, writes=(0,), transient_nbytes=300),
        Instruction(Op.BACKWARD, 0, 1, reads=(0,), writes=(1,), frees=(0,), gradients=((1, 0), (1, 1)), transient_nbytes=200),
        Instruction(Op.FETCH, chunks=(0, 1)),
        Instruction(Op.UPDATE, chunks=(0, 1), transient_nbytes=10),
        Instruction(Op.EVICT, chunks=(0, 1)),
        Instruction(Op.FREE, chunks=(0, 1)),
    ),
    base_nbytes=1000,
    storage_of=(0, 1),
    storage_nbytes=(100, 50),
    held=(),
    grad_nbytes={0: 25, 1: 25},
    state_nbytes={0: 40, 1: 40},
)
TIMELINE: Timeline = simulate(PROGRAM)


class Script:
    """A gauge that gives one reading after the other."""

    exact = True

    def __init__(self, *readings: tuple[int, int]) -> None:
        self._readings: Iterator[Reading] = (Reading(*reading) for reading in readings)

    def read(self) -> Reading:
        """See `Gauge.read`."""
        return next(self._readings)


def _watch(*readings: tuple[int, int], absent: int = 0, strict: bool = True, level: int = 0) -> tuple[Watch, list[str]]:
    lines: list[str] = []
    guard = Guard(Script(*readings), ["a[0:2]", "b[0:2]"], StepLog(level, lines.append), strict=strict)
    return guard.watch(PROGRAM, TIMELINE, "step 1 of 2, sweep 3", absent), lines


def test_what_was_promised_is_no_error_whatever_the_user_holds() -> None:
    watch, _ = _watch((1700, 9000), (1800, 2000), (3800, 5000), (3750, 4000))
    watch.anchor(0)
    watch.check(0)
    watch.anchor(1)  # the user's code has made 2000 more meanwhile
    watch.check(1)


def test_one_byte_over_the_peak() -> None:
    watch, _ = _watch((1700, 9000), (1800, 2001))
    watch.anchor(0)
    with pytest.raises(MemoryPromiseError) as caught:
        watch.check(0)
    assert (caught.value.measured_nbytes, caught.value.promised_nbytes) == (1301, 1300)
    told = str(caught.value)
    assert told.startswith("step 1 of 2, sweep 3, instruction 1 of 6 (FORWARD of segment 0): 1301 bytes at its peak, where the plan ")
    assert "promised at most 1300 (1 B over). No weight was changed" in told
    assert "CHUNKFT_GUARD=0" in told


@pytest.mark.parametrize("over", [0, 1])
def test_values_smaller_than_planned_are_not_missed_when_they_are_freed(over: int) -> None:
    """Of 100 bytes that the backward frees there were 30: it may take no more than the program says, less 70."""
    watch, _ = _watch((1700, 9000), (1730, 1900), (1730, 1730), (1700 + 50 + over, 1880))
    watch.anchor(0)
    watch.check(0)
    watch.anchor(1, 70)
    if not over:
        watch.check(1)
        return
    with pytest.raises(MemoryPromiseError, match="1051 bytes left live, where the plan promised at most 1050"):
        watch.check(1)


def test_one_byte_left_behind() -> None:
    watch, _ = _watch((1000, 1000), (1101, 1101))
    watch.anchor(0)
    with pytest.raises(MemoryPromiseError, match="1101 bytes left live, where the plan promised at most 1100"):
        watch.check(0)


def test_state_that_is_yet_to_be_made_was_promised_from_the_start() -> None:
    watch, _ = _watch((970, 970), (1100, 1300), absent=30)
    watch.anchor(0)
    watch.check(0)
    watch, _ = _watch((970, 970), (1100, 1301), absent=30)
    watch.anchor(0)
    with pytest.raises(MemoryPromiseError, match="1301 bytes"):
        watch.check(0)


def test_what_was_updated_is_named() -> None:
    watch, _ = _watch((1050, 1050), (1130, 1130), (1130, 1141))
    watch.begin_update(PROGRAM.instructions[2:])
    watch.check(watch.number_of(0))
    with pytest.raises(MemoryPromiseError, match=r"All chunks of the step were updated \(a\[0:2\], b\[0:2\]\)"):
        watch.check(watch.number_of(1))


def test_one_of_two_optimizers_takes_its_part_of_the_promise() -> None:
    mine = tuple(replace(step, chunks=(1,)) for step in PROGRAM.instructions[2:])
    watch, _ = _watch((1050, 1050), (1090, 1090), (1090, 1100), (1090, 1090), (1051, 1090))
    watch.begin_update(mine)
    for place in range(3):
        watch.check(watch.number_of(place))
    with pytest.raises(MemoryPromiseError, match=r"instruction 6 of 6 \(FREE\): 1051 bytes left live.* at most 1050"):
        watch.check(watch.number_of(3))


def test_the_first_breach_is_the_one_that_is_told_and_it_can_wait() -> None:
    watch, _ = _watch((1050, 1050), (1131, 1131), (1140, 1200))
    watch.anchor(2)
    watch.look(2)
    watch.look(3)
    with pytest.raises(MemoryPromiseError, match="instruction 3 of 6"):
        watch.settle()


def test_unless_strict_nothing_is_raised_but_all_is_told() -> None:
    watch, lines = _watch((1000, 1000), (1101, 1500), strict=False, level=2)
    watch.anchor(0)
    watch.check(0)
    assert lines == ["chunkft:   FORWARD  segment 0   1.0 kB -> 1.5 kB -> 1.1 kB, promised 1.0 kB -> 1.3 kB -> 1.1 kB"]


def test_a_line_per_step_adds_up_its_parts() -> None:
    lines: list[str] = []
    log = StepLog(1, lines.append)
    readings = (1000, 0), (1100, 1300), (1050, 0), (1130, 1130), (1130, 1140), (1130, 1130), (1070, 1130)
    guard = Guard(Script(*readings), ["a", "b"], log, strict=True)
    for numbers in ((0,), (2, 3, 4, 5)):
        watch = guard.watch(PROGRAM, TIMELINE, "step 1 of 2, sweep 3", 0)
        watch.anchor(numbers[0])
        for number in numbers[:3]:
            watch.check(number)
    with pytest.raises(MemoryPromiseError):
        watch.check(5)
    log.finish()
    log.finish()
    (line,) = lines
    start, _, end = line.partition(" s, ")
    assert start.startswith("chunkft: step 1 of 2, sweep 3: 2 active chunks, predicted 1.3 kB -> measured 1.3 kB, ")
    assert end == f"{format_nbytes(80)} fetched, {format_nbytes(60)} evicted"


@pytest.mark.usefixtures("allocator")
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4)
    assert isinstance(open_guard(weight.device, [], [weight]).gauge, CpuGauge)
    monkeypatch.setenv("CHUNKFT_GUARD", "0")
    assert open_guard(weight.device, [], [weight]).gauge is None
    monkeypatch.setenv("CHUNKFT_DEBUG", "1")
    unwatched = open_guard(weight.device, [], [weight])
    assert isinstance(unwatched.gauge, CpuGauge)
    assert not unwatched.strict


def test_weights_from_before_the_hook_are_adopted(allocator: Allocator) -> None:
    allocator.remove()
    weight = torch.zeros(256)
    before = allocator.live()
    guard = open_guard(weight.device, [], [weight])
    assert install().live() - before == weight.nbytes
    del weight, guard
    assert allocator.live() == before


def test_without_a_compiler_it_is_off_and_said_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Allocator:
        raise BuildError("no g++ here")

    monkeypatch.setattr(guards, "install", fail)
    found = [open_guard(torch.device("cpu"), [], []) for _ in range(2)]
    assert [guard.gauge for guard in found] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "running steps are not held to the memory that was planned for them: no g++ here"
    ]
    watch = found[0].watch(PROGRAM, TIMELINE, "step 1 of 1, sweep 1", 0)
    watch.anchor(0)
    watch.check(0)


@pytest.mark.usefixtures("allocator")
def test_the_gauge_of_a_cpu_reads_every_peak_once() -> None:
    gauge = CpuGauge(install())
    before = gauge.read().live_nbytes
    torch.empty(1000, dtype=torch.uint8)
    kept = torch.empty(10, dtype=torch.uint8)
    assert gauge.read() == (before + 10, before + 1000)
    assert gauge.read() == (before + kept.nbytes, before + 10)


@pytest.mark.parametrize(("exact", "resets", "peak"), [(False, 0, 60), (True, 3, 90)])
def test_an_accelerators_peak_is_reset_only_on_request(monkeypatch: pytest.MonkeyPatch, exact: bool, resets: int, peak: int) -> None:
    stats: dict[str, int] = {}
    done: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", done.append)
    gauge = AcceleratorGauge(torch.device("cuda"), exact=exact)

    def read(live: int, highest: int) -> tuple[int, int]:
        stats.update({"allocated_bytes.all.current": live, "allocated_bytes.all.peak": highest})
        return gauge.read()

    assert read(50, 90) == (50, 90)
    assert read(60, 90) == (60, peak)  # without a reset, 90 may be that of before
    assert read(60, 95) == (60, 95)
    assert len(done) == resets
