"""Moves copies away from the calls that wait for them: FETCH earlier, FREE later, as far as the bytes of the budget allow.

A program is written as if every copy were waited for: FETCH right before the first use, FREE right after EVICT. That is its smallest
form. Where copies run beside calls, `overlap` spends bytes that the budget leaves at that moment: it lets evicted state stay for one more
update, begins a fetch in time for its use, and lets what was evicted stay until its copy is complete. Weights that are needed again soon
are not fetched twice. Calls keep their order, so nothing changes but bytes and time, and `simulate` replays the result like any program.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

from chunkft_compile.planner.program import Clock, Instruction, Op, Program, simulate


def overlap(program: Program, limit_nbytes: int) -> Program:
    """The same step with its copies beside its calls, in at most `limit_nbytes` or what it needs anyway."""
    if not program.overlaps:
        return program
    peaks = [moment.peak_nbytes for moment in simulate(program).moments]
    limit = max(limit_nbytes, *peaks)
    track = _Track(program, list(program.instructions), peaks, limit)
    track.keep_weights()
    track.free_behind()
    track.fetch_early()
    return replace(program, instructions=tuple(track.free_late()))


@dataclass
class _Track:
    """The instructions of a step and the most bytes while each one runs."""

    program: Program
    steps: list[Instruction]
    peaks: list[int]
    limit: int

    def keep_weights(self) -> None:
        """Weights stay from the forward to the backward of a segment where there is room beside them to fetch others."""
        spare = max(self.program.weight_nbytes.values(), default=0)
        frees = [i for i, step in enumerate(self.steps) if step.op is Op.FREE and step.weights]
        for free in reversed(frees):  # from the top: those wait for the shortest time
            (segment,) = self.steps[free].weights
            again = next((i for i in range(free, len(self.steps)) if self._fetches(i, segment)), None)
            if again is None:
                continue
            nbytes = self.program.weight_nbytes[segment]
            between = self.peaks[free + 1 : again]
            if not between or max(between) + nbytes + spare <= self.limit:
                self.peaks[free + 1 : again] = [peak + nbytes for peak in between]
                del self.steps[again], self.peaks[again]
                del self.steps[free], self.peaks[free]

    def _fetches(self, i: int, segment: int) -> bool:
        return self.steps[i].op is Op.FETCH and segment in self.steps[i].weights

    def free_behind(self) -> None:
        """Evicted state stays until the next update is done, where there is room.

        Fetches would take that room otherwise, long before they are needed, and for each one the next update would wait until a write
        that has only just begun is complete.
        """
        for free in range(len(self.steps) - 1, -1, -1):
            if self.steps[free].op is not Op.FREE or not self.steps[free].chunks:
                continue
            stop = next((i for i in range(free + 1, len(self.steps)) if self.steps[i].op in (Op.UPDATE, Op.BACKWARD)), free)
            nbytes = self.program.nbytes_of(self.steps[free].moved)
            peaks = [peak + nbytes for peak in self.peaks[free + 1 : stop + 1]]
            if self.steps[stop].op is Op.UPDATE and max(peaks) <= self.limit:
                self.steps[free : stop + 1] = [*self.steps[free + 1 : stop + 1], self.steps[free]]
                self.peaks[free : stop + 1] = [*peaks, peaks[-1]]

    def fetch_early(self) -> None:
        """Every FETCH moves up until its copy is complete in time, as far as there is room. Their order stays."""
        latest = self._latest_us()
        for number in range(len(self.steps)):
            if self.steps[number].op is Op.FETCH:
                self._fetch_early(number, latest[number])

    def _latest_us(self) -> dict[int, int]:
        """When each FETCH must begin, on the clock of the calls: before its first use, and before the next FETCH must."""
        clock = list(accumulate((_call_us(step) for step in self.steps), initial=0))
        found: dict[int, int] = {}
        following = clock[-1]
        for number in range(len(self.steps) - 1, -1, -1):
            step = self.steps[number]
            if step.op is Op.FETCH:
                following = min(following, clock[number]) - step.us
                found[number] = following
            elif step.op is Op.EVICT:  # it takes its turn among the copies
                following -= step.us
        return found

    def _fetch_early(self, number: int, latest_us: int) -> None:
        fetch = self.steps[number]
        clock = sum(map(_call_us, self.steps[:number]))
        nbytes = self.program.nbytes_of(fetch.moved)
        place = number
        while place > 0 and clock > latest_us:
            above = self.steps[place - 1]
            if self.peaks[place - 1] + nbytes > self.limit or self._bars(above, fetch):
                break
            place -= 1
            clock -= _call_us(above)
        if place < number:
            del self.steps[number], self.peaks[number]
            self.peaks[place:number] = [peak + nbytes for peak in self.peaks[place:number]]
            # what is live when it begins is at most what is live while the instruction runs that it now stands before
            self.steps.insert(place, fetch)
            self.peaks.insert(place, self.peaks[place])

    def _bars(self, above: Instruction, fetch: Instruction) -> bool:
        """Whether a FETCH may not begin before this instruction."""
        if above.op is Op.FETCH or not above.moved.isdisjoint(fetch.moved):
            return True
        if not fetch.chunks:
            return False
        # the optimizer's state comes in the backward at the earliest, and only in one that a step follows
        return above.op is Op.FORWARD or (above.op is Op.BACKWARD and self.program.accumulating)

    def free_late(self) -> list[Instruction]:
        """Every FREE of what was evicted waits until its copy is complete or its bytes are needed."""
        written: list[Instruction] = []
        clock, evicted = Clock(overlaps=True), set[tuple[str, int]]()
        waiting: list[Instruction] = []
        for peak, step in zip(self.peaks, self.steps, strict=True):
            while waiting:
                stays = peak + sum(self.program.nbytes_of(free.moved) for free in waiting) <= self.limit
                if stays and clock.done_us(waiting[0]) > clock.us and all(free.moved.isdisjoint(step.moved) for free in waiting):
                    break
                clock.run(waiting[0])
                written.append(waiting.pop(0))
            if step.op is Op.FREE and step.moved and step.moved <= evicted:
                waiting.append(step)
                continue
            clock.run(step)
            written.append(step)
            if step.op is Op.EVICT:
                evicted |= step.moved
            elif step.op is Op.FETCH:
                evicted -= step.moved
        return [*written, *waiting]


def _call_us(step: Instruction) -> int:
    """Time of an instruction beside which copies run."""
    return 0 if step.op in (Op.FETCH, Op.EVICT) else step.us
