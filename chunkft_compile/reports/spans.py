"""Steps in rows that a person can read: one each, or, of a sweep of hundreds, as many neighbours in a row as it takes."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from chunkft_compile.planner import Problem, Schedule, Step
from chunkft_compile.planner.bounds import depth_of
from chunkft_compile.planner.schedules import compress, count_options
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.document import Table

MOST_ROWS = 24
_CHUNK = re.compile(r"(?P<parameter>.*)\[(?P<start>\d+):(?P<stop>\d+)\]", re.DOTALL)
_NAMED = 3  # chunks of a segment that is trained in part


@dataclass(frozen=True, slots=True)
class Span:
    """The steps `first` to `last` of a sweep, both included, counted from 1."""

    first: int
    last: int
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """`3`, or `3-7`."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def chunks(self) -> tuple[int, ...]:
        """What its steps train, ascending."""
        return tuple(sorted(index for step in self.steps for index in step.chunks))


def spans(schedule: Schedule, most: int = MOST_ROWS) -> list[Span]:
    """The steps in at most `most` spans of nearly equal length."""
    steps, count = schedule.steps, min(most, len(schedule.steps))
    edges = [number * len(steps) // count for number in range(count + 1)]
    return [Span(first + 1, last, steps[first:last]) for first, last in pairwise(edges)]


def steps_table(problem: Problem, schedule: Schedule) -> Table:
    """What each step trains, how, in which memory and time. Of several steps in a row: the sum, and the highest peak."""
    rows = []
    for span in spans(schedule):
        lowest = min(depth_of(problem, step.chunks) for step in span.steps)
        updates = ", ".join(sorted({step.update for step in span.steps}))
        rows.append(
            (
                f"{span.name} of {len(schedule.steps)}",
                str(len(span.chunks)),
                format_nbytes(sum(problem.chunks[index].grad_nbytes for index in span.chunks)),
                compress([problem.segments[s].name for s in sorted({problem.chunks[index].segment for index in span.chunks})]),
                problem.segments[lowest].name,
                _options(problem, span),
                updates,
                format_nbytes(max(step.peak_nbytes for step in span.steps)),
                format_us(sum(step.us for step in span.steps)),
            )
        )
    headers = ("step", "chunks", "gradients", "segments", "depth", "options", "update", "peak", "time")
    return Table(headers, tuple(rows), frozenset({3, 4, 5, 6}))


def _options(problem: Problem, span: Span) -> str:
    """How many segments have which option, those below the depth left out: they keep nothing, whatever their option is."""
    options = [option for step in span.steps for option in step.options[depth_of(problem, step.chunks) :]]
    return count_options(options) if len(span.steps) == 1 else ", ".join(dict.fromkeys(options))


def trained(problem: Problem, span: Span) -> Iterator[str]:
    """What is trained: whole segments together, then those of which only some chunks are, by name where it is one step."""
    of_segment = Counter(chunk.segment for chunk in problem.chunks)
    found: dict[int, list[str]] = {}
    for index in span.chunks:
        found.setdefault(problem.chunks[index].segment, []).append(problem.chunks[index].name)
    whole = [s for s in sorted(found) if len(found[s]) == of_segment[s]]
    if whole:
        yield f"all of {compress([problem.segments[s].name for s in whole])}"
    alike: dict[tuple[int, int, str], list[str]] = {}
    for s in sorted(found.keys() - set(whole)):
        named = _named(found[s]) if span.first == span.last else ""
        alike.setdefault((len(found[s]), of_segment[s], named), []).append(problem.segments[s].name)
    for (count, total, named), segments in alike.items():
        yield f"{count} of {total} chunks of {'each of ' if len(segments) > 1 else ''}{compress(segments)}{named}"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f": {', '.join(names[:_NAMED])}{more}"


def rows_of(name: str) -> tuple[str, int, int]:
    """`fqn`, 0 and 64 of a chunk `fqn[0:64]`; another name is that of one row of its own."""
    found = _CHUNK.fullmatch(name)
    return (found["parameter"], int(found["start"]), int(found["stop"])) if found else (name, 0, 1)
