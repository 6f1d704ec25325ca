"""A plan on a page: does it fit, what is trained when, what fills memory at the peak, where things live, what it was made for."""

from collections.abc import Sequence
from dataclasses import asdict

from chunkft_compile.planner import Placement, Plan, Trace, traces_of
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.document import Section, Table
from chunkft_compile.reports.moments import categories_table, instant_name, largest_table, share, time_split, time_table
from chunkft_compile.reports.spans import spans, steps_table, trained


def summary(planned: Plan) -> list[Section]:
    """All there is to say about a plan, the most important first."""
    traces = traces_of(planned)
    return [
        headline(planned),
        _steps(planned),
        _memory(planned, traces),
        _time(traces),
        _trained(planned),
        placements(planned),
        made_for(planned),
    ]


def headline(planned: Plan) -> Section:
    """Does it fit, with what margin, how long does it take, and how good is it."""
    schedule = planned.schedule
    free = schedule.budget_nbytes - schedule.peak_nbytes
    return Section(
        f"{format_nbytes(schedule.peak_nbytes)} of {format_nbytes(schedule.budget_nbytes)}, T = {len(schedule.steps)}, "
        f"{format_us(schedule.sweep_us)} per sweep",
        (
            f"At the fullest instruction {format_nbytes(free)} ({share(free, schedule.budget_nbytes)}) of the budget are free.",
            f"Every parameter is trained once in {steps_word(len(schedule.steps))}.",
            f"{schedule.status}: it is proven that no plan of these chunks takes more than {schedule.gap:.1%} off the time of the sweep "
            f"(found in {schedule.solve_s:.1f} s).",
            how_sure(planned),
        ),
    )


def steps_word(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step{'' if count == 1 else 's'}"


def how_sure(planned: Plan) -> str:
    """Nobody should take a model for a measurement."""
    if planned.lowered:
        return "Peaks are exact, those of the programs that run; times add up operators that were measured."
    return f"Modelled, not measured: nothing ran on {planned.fingerprint.device}; peaks are the planner's bound, times a roofline."


def fullest(traces: Sequence[Trace]) -> int:
    """The number of the step with the highest peak."""
    return max(range(len(traces)), key=lambda number: traces[number].peak_nbytes)


def _steps(planned: Plan) -> Section:
    return Section("Steps", (), (steps_table(planned.problem, planned.schedule),))


def _memory(planned: Plan, traces: Sequence[Trace]) -> Section:
    step = fullest(traces)
    trace = traces[step]
    number = trace.binding
    sentence = f"The fullest instruction of the sweep is {instant_name(trace, number)} in step {step + 1} of {len(traces)}."
    return Section("Memory at the peak", (sentence,), (categories_table(trace, number), largest_table(trace, number)))


def _time(traces: Sequence[Trace]) -> Section:
    return Section("Time of a sweep", (), (time_table(time_split(traces)),))


def _trained(planned: Plan) -> Section:
    count = len(planned.schedule.steps)
    rows = []
    for span in spans(planned.schedule):
        for number, text in enumerate(trained(planned.problem, span)):
            rows.append((f"{span.name} of {count}" if number == 0 else "", text))
    return Section("What each step trains", (), (Table(("step", "trains"), tuple(rows), frozenset({1})),))


def by_place(planned: Plan) -> dict[str, dict[Placement, int]]:
    """Bytes of optimizer state, and of weights that may move, by the place where they live between uses."""
    problem, places = planned.problem, planned.schedule.places
    state = zip(places.state, (chunk.state_nbytes for chunk in problem.chunks), strict=True)
    weights = zip(places.weights, (segment.weight_nbytes for segment in problem.segments), strict=True)
    found = {"optimizer state": dict.fromkeys(Placement, 0), "weights of segments": dict.fromkeys(Placement, 0)}
    for name, pairs in (("optimizer state", state), ("weights of segments", weights)):
        for place, nbytes in pairs:
            found[name][place] += nbytes
    return found


def placements(planned: Plan) -> Section:
    """Where optimizer state and weights live between uses."""
    places = by_place(planned)
    used = [place for place in Placement if place is Placement.DEVICE or any(sizes[place] for sizes in places.values())]
    rows = [(str(place), *(format_nbytes(sizes[place]) for sizes in places.values())) for place in used]
    return Section("Placements", (), (Table(("place", *places), tuple(rows)),))


def made_for(planned: Plan) -> Section:
    """What the plan depends on."""
    rows = fingerprint_rows(planned)
    return Section("Made for", (), (Table(("", "this plan"), tuple(rows.items()), frozenset({0, 1})),))


def fingerprint_rows(planned: Plan) -> dict[str, str]:
    """The fields of the fingerprint as text; chunks are counted."""
    fields = asdict(planned.fingerprint)
    names = fields.pop("chunks")
    parameters = {name.rpartition("[")[0] for name in names}
    texts = {name: ", ".join(value) if isinstance(value, tuple) else str(value) for name, value in fields.items()}
    return {**texts, "chunks": f"{len(names)} of {len(parameters)} parameters"}
