"""Which bytes of a file are in use: page-aligned ranges, those given back used again."""

import bisect
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes `[start, start + nbytes)`."""

    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """The first byte behind it."""
        return self.start + self.nbytes


class Ranges:
    """Hands out ranges of `[0, end)`, `end` growing as needed. Both ends of each are multiples of `grain`."""

    def __init__(self, grain: int) -> None:
        self.grain = grain
        self.end = 0
        self._free: list[Range] = []  # by start; no two touch

    def rounded(self, nbytes: int) -> int:
        """Bytes of a range that holds `nbytes`."""
        return max(1, -(-nbytes // self.grain)) * self.grain

    def find(self, nbytes: int) -> Range:
        """The smallest free range that holds `nbytes`, cut to size, or else new bytes at the end. Nothing is taken yet."""
        nbytes = self.rounded(nbytes)
        fitting = [free for free in self._free if free.nbytes >= nbytes]
        if fitting:
            return Range(min(fitting, key=lambda free: (free.nbytes, free.start)).start, nbytes)
        return Range(self.end, nbytes)

    def take(self, wanted: Range) -> None:
        """Take what `find` gave."""
        if wanted.start == self.end:
            self.end = wanted.stop
            return
        at = bisect.bisect_left(self._free, Range(wanted.start, 0))
        free = self._free[at]
        assert free.start == wanted.start, f"{wanted} is not free"
        assert free.stop >= wanted.stop, f"only {free} of {wanted} is free"
        rest = Range(wanted.stop, free.nbytes - wanted.nbytes)
        self._free[at : at + 1] = [rest] if rest.nbytes else []

    def give_back(self, freed: Range) -> None:
        """The bytes of a range may be used again."""
        at = bisect.bisect_left(self._free, freed)
        before, after = self._free[:at], self._free[at:]
        assert all(free.stop <= freed.start for free in before[-1:]), f"{freed} is free already"
        assert all(free.start >= freed.stop for free in after[:1]), f"{freed} is free already"
        if before and before[-1].stop == freed.start:
            freed = Range(before[-1].start, freed.stop - before.pop().start)
        if after and after[0].start == freed.stop:
            freed = Range(freed.start, after.pop(0).stop - freed.start)
        self._free = [*before, freed, *after]
