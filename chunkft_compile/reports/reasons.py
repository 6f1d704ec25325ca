"""Why a plan is as it is: what fills its peak and what would lower it, what holds T, and what its time is spent on."""

from collections.abc import Sequence
from dataclasses import replace

from chunkft_compile.planner import Category, Op, Plan, Trace, smallest_budget, traces_of
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.reports.document import Section
from chunkft_compile.reports.levers import forbidden, how, levers, why_steps, why_time
from chunkft_compile.reports.moments import categories_at, categories_table, instant_name, largest_table, share, time_table
from chunkft_compile.reports.summary import fullest, headline, how_sure, steps_word

_WHY = {
    Op.FORWARD: "What the segments below have saved waits for their backward.",
    Op.BACKWARD: "What the segments below have saved waits for their backward, and gradients wait for their update.",
    Op.UPDATE: "Gradients that were not applied yet are there, and what the optimizer needs for one of them comes on top.",
    Op.FETCH: "What comes from the store is there from here on, before what waits for it.",
    Op.EVICT: "What goes to the store is there until it is freed.",
    Op.FREE: "What is freed is there until then.",
}


def reasons(planned: Plan) -> list[Section]:
    """Everything that can be said about why, the peak first. Takes seconds: it looks for other sweeps."""
    traces = traces_of(planned)
    step = fullest(traces)
    peak = replace(moment(traces, step, traces[step].binding), title="Why this peak")
    return [headline(planned), peak, _lower(planned, traces[step]), why_steps(planned), why_time(planned, traces), levers(planned, traces)]


def reasons_at(planned: Plan, step: int | None, at: str | None) -> list[Section]:
    """One step (from 1 on; the fullest one where it is None) at one instruction, by number (from 1 on) or name; else at its own peak."""
    traces = traces_of(planned)
    if step is not None and not 1 <= step <= len(traces):
        raise ValueError(f"there is no step {step}: the plan has {steps_word(len(traces))}, counted from 1")
    number = fullest(traces) if step is None else step - 1
    trace = traces[number]
    split = Section(f"Time of step {number + 1}", (how_sure(planned),), (time_table(trace.time_split()),))
    return [moment(traces, number, _instant(trace, number, at)), split]


def _instant(trace: Trace, step: int, at: str | None) -> int:
    if at is None:
        return trace.binding
    count = len(trace.instants)
    if at.isdecimal():
        if not 1 <= int(at) <= count:
            raise ValueError(f"there is no instruction {at} in step {step + 1}: it has {count}, counted from 1")
        return int(at) - 1
    named = [number for number, instant in enumerate(trace.instants) if instant.name == at]
    if not named:
        some = ", ".join(dict.fromkeys(instant.name for instant in trace.instants if instant.op in (Op.FORWARD, Op.BACKWARD)))
        raise ValueError(f"there is no instruction {at!r} in step {step + 1}: name one by number, 1 to {count}, or as one of {some}")
    return max(named, key=lambda number: trace.instants[number].peak_nbytes)


def moment(traces: Sequence[Trace], step: int, number: int) -> Section:
    """What is there at one instruction."""
    trace = traces[step]
    instant, there = trace.instants[number], categories_at(trace, number)
    first = max(there, key=lambda category: there[category])
    sentences = [
        f"Step {step + 1} of {len(traces)}, {instant_name(trace, number)}: {format_nbytes(instant.peak_nbytes)}, "
        f"of which {share(there[first], instant.peak_nbytes)} are {first}.",
        _WHY[instant.op],
    ]
    if number == trace.binding:
        others = [other for n, other in enumerate(trace.instants) if n != number and other.name != instant.name]
        if others:
            second = max(others, key=lambda other: other.peak_nbytes)
            less = format_nbytes(instant.peak_nbytes - second.peak_nbytes)
            sentences.append(f"This is the peak of the step. The next fullest, {second.name}, needs {less} less.")
    else:
        most = trace.instants[trace.binding]
        less = format_nbytes(most.peak_nbytes - instant.peak_nbytes)
        sentences.append(f"The peak of the step is that of {most.name}, {less} more.")
    tables = (categories_table(trace, number), largest_table(trace, number))
    return Section(f"Memory in step {step + 1}, {instant.name}", tuple(sentences), tables)


def _lower(planned: Plan, trace: Trace) -> Section:
    problem, number = planned.problem, trace.binding
    nbytes, binding = smallest_budget(problem)
    instant, there = trace.instants[number], categories_at(trace, number)
    sentences = [
        f"These chunks fit any budget from {format_nbytes(nbytes, up=True)} on, in more steps; {binding} needs that much even where one "
        "chunk is trained. A plan made for a smaller budget has smaller chunks and may go lower.",
    ]
    for what, other in forbidden(planned).items():
        smallest = smallest_budget(other)[0]
        if smallest < nbytes:
            sentences.append(
                f"{what} ({how(planned, what)}), which the plan was not allowed, would do with {format_nbytes(smallest, up=True)}."
            )
    grows = there[Category.SAVED] + (0 if instant.op is Op.UPDATE else there[Category.WORKSPACE])
    little = " little" if grows < instant.peak_nbytes // 10 else ""
    sentences.append(
        f"A smaller batch or shorter sequences help{little}: what grows with the tokens of a batch is {format_nbytes(grows)} of the peak "
        f"({share(grows, instant.peak_nbytes)})."
    )
    return Section("What would lower the peak", tuple(sentences))
