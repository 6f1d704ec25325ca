"""No byte is handed out twice, bytes given back are used again, and neighbours become one range."""

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.runtime.ranges import Range, Ranges

GRAIN = 4096


def _take(ranges: Ranges, nbytes: int) -> Range:
    found = ranges.find(nbytes)
    ranges.take(found)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.just("take"), st.integers(0, 40_000)), st.tuples(st.just("give"), st.integers(0, 99))), max_size=60))
def test_ranges_in_use_never_overlap(moves: list[tuple[str, int]]) -> None:
    ranges, used = Ranges(GRAIN), list[Range]()
    for move, number in moves:
        if move == "take":
            found = _take(ranges, number)
            assert found.nbytes == ranges.rounded(number) >= max(number, 1)
            assert found.start % GRAIN == found.nbytes % GRAIN == 0
            assert all(found.stop <= other.start or other.stop <= found.start for other in used)
            used.append(found)
        elif used:
            ranges.give_back(used.pop(number % len(used)))
        assert max((r.stop for r in used), default=0) <= ranges.end
    end = ranges.end
    for other in used:
        ranges.give_back(other)
    if end:
        assert _take(ranges, end) == Range(0, end)  # all of it is one range again


def test_the_smallest_gap_that_fits_is_used() -> None:
    ranges = Ranges(GRAIN)
    taken = [_take(ranges, pages * GRAIN) for pages in (5, 1, 2, 1, 3)]
    for gap in taken[::2]:
        ranges.give_back(gap)
    assert ranges.find(2 * GRAIN).start == taken[2].start
    assert ranges.find(6 * GRAIN).start == ranges.end


def test_looking_takes_nothing() -> None:
    ranges = Ranges(GRAIN)
    assert ranges.find(1) == ranges.find(1)
    assert ranges.end == 0
