"""What is there at one instruction of a step, and where the time of a step goes, as tables."""

from collections.abc import Iterable

from chunkft_compile.planner import Category, Trace
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.document import Table

_LARGEST = 8


def share(part: int, whole: int) -> str:
    """`12.5%`; of nothing, nothing."""
    return f"{part / whole:.1%}" if whole else "0.0%"


def instant_name(trace: Trace, number: int) -> str:
    """`backward block 3 (instruction 17 of 42)`."""
    return f"{trace.instants[number].name} (instruction {number + 1} of {len(trace.instants)})"


def categories_at(trace: Trace, number: int) -> dict[Category, int]:
    """Bytes of each category at an instruction, none left out."""
    return {category: stack[number] for category, stack in trace.stacks().items()}


def categories_table(trace: Trace, number: int) -> Table:
    """What is there by category, the largest first; it adds up to the peak of the instruction."""
    peak = trace.instants[number].peak_nbytes
    there = sorted(categories_at(trace, number).items(), key=lambda item: -item[1])
    rows = [(str(category), format_nbytes(nbytes), share(nbytes, peak)) for category, nbytes in there if nbytes]
    return Table(("category", "bytes", "share"), (*rows, ("all", format_nbytes(peak), share(peak, peak))))


def largest_table(trace: Trace, number: int, most: int = _LARGEST) -> Table:
    """The largest of what is there, each with the instructions between which it lives, and the rest in one row."""
    peak, live = trace.instants[number].peak_nbytes, trace.live_at(number)
    rows = [
        (
            lifetime.name,
            str(lifetime.category),
            format_nbytes(lifetime.nbytes),
            share(lifetime.nbytes, peak),
            _life(lifetime.first, lifetime.last),
        )
        for lifetime in live[:most]
    ]
    if others := live[most:]:
        nbytes = sum(lifetime.nbytes for lifetime in others)
        rows.append((f"{len(others)} more", "", format_nbytes(nbytes), share(nbytes, peak), ""))
    return Table(("what", "category", "bytes", "share", "instructions"), tuple(rows), frozenset({0, 1}))


def _life(first: int, last: int) -> str:
    return str(first + 1) if first == last else f"{first + 1}-{last + 1}"


def time_split(traces: Iterable[Trace]) -> dict[str, int]:
    """Microseconds by what they are spent on, added up; the hidden transfers are beside the others."""
    total: dict[str, int] = {}
    for trace in traces:
        for what, us in trace.time_split().items():
            total[what] = total.get(what, 0) + us
    return total


def time_table(split: dict[str, int]) -> Table:
    """Where the time goes. What compute hides takes none and has no share."""
    whole = sum(us for what, us in split.items() if what != "hidden transfers")
    rows = [(what, format_us(us), "beside compute" if what == "hidden transfers" else share(us, whole)) for what, us in split.items() if us]
    return Table(("time of", "", "share"), (*rows, ("all", format_us(whole), share(whole, whole))))
