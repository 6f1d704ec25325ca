"""What holds T, what time is spent on, and what would change either: more bytes, or what the plan was not allowed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chunkft_compile.planner import Placement, Plan, Problem, Schedule, Trace, Update, sketch, transfer_us
from chunkft_compile.planner.explaining import alternatives, fits_at_all
from chunkft_compile.planner.limits import Capacity
from chunkft_compile.planner.traces import trace_bound
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.document import Section, Table
from chunkft_compile.reports.moments import share, time_split, time_table
from chunkft_compile.reports.others import bound_of, in_fewer_steps
from chunkft_compile.reports.summary import by_place, steps_word

_FULL = 0.99  # of the budget
_SECONDS = 2.0  # of looking for fewer steps, for each number of them
_MORE = (1.25, 2.0)  # times the budget, where fewer steps cannot be had
_SMALL = 0.02  # of the sweep: less needs no sentence


def forbidden(planned: Plan) -> dict[str, Problem]:
    """What the plan was not allowed by name, and its problem with it."""
    problem = planned.problem
    found = alternatives(problem, streaming=True)
    if not planned.lowered and not any(link.overlaps for link in problem.links):  # on the device itself, the compiler tries both
        found["copies beside compute"] = replace(problem, links=tuple(replace(link, overlaps=True) for link in problem.links))
    return found


def how(planned: Plan, what: str) -> str:
    """How to allow what a plan was not, by its name in `forbidden`."""
    return {
        "weights beside the device": "compile(weights=...)" if planned.lowered else "--weights host",
        "IMMEDIATE updates": "--update auto",
        "no accumulation": "--accumulate 1",
        "optimizer state beside the device": "without --state device",
        "copies beside compute": "--overlap",
    }[what]


def why_steps(planned: Plan) -> Section:
    """What holds T."""
    count, problem = len(planned.schedule.steps), planned.problem
    if count == 1:
        return Section("Why T = 1", ("Every step trains every parameter: T can not be less.",))
    if not fits_at_all(problem):  # kept for a larger batch than it was solved for, and lowered steps need less than the planner's bound
        return Section(f"Why T = {count}", ("By the planner's bound the steps do not fit the budget; lowered they do.",))
    full = sum(step.peak_nbytes >= _FULL * problem.budget_nbytes for step in planned.schedule.steps)
    sentences = [*_room(problem), f"{full} of {steps_word(count)} fill the budget to {_FULL:.0%} or more."]
    sweep = None if planned.schedule.status == "GREEDY" else sketch(problem, prefer="fresh")
    if sweep is not None and len(sweep.steps) < count:
        sentences.append(
            f"A sweep of {steps_word(len(sweep.steps))} fits, too, in {format_us(sweep.sweep_us)}; --prefer fresh chooses the fewest steps."
        )
    return Section(f"Why T = {count}", tuple(sentences))


def _room(problem: Problem) -> Iterator[str]:
    """How many steps there must be, from the gradients that a step has room for."""
    capacity, top = Capacity(problem), len(problem.segments) - 1
    least = max(capacity.fewest_steps(s) for s in range(len(problem.segments)))
    total = sum(chunk.grad_nbytes for chunk in problem.chunks)
    if problem.updates == (Update.HELD,):
        most = capacity.most_gradients(top, min(capacity.update_nbytes))
        yield (
            f"Gradients are held until optimizer.step(). All of them are {format_nbytes(total)}, and beside weights and what its update or "
            f"its lowest segment takes a step has room for {format_nbytes(most)} at most: no sweep of these chunks has fewer than "
            f"{steps_word(least)}."
        )
    else:
        yield (
            f"IMMEDIATE updates free gradients inside backward, so a step is held by the gradients of one segment and by the choices that "
            f"make it fast: no sweep of these chunks has fewer than {steps_word(least)}."
        )


def why_time(planned: Plan, traces: Sequence[Trace]) -> Section:
    """What the sweep spends its time on."""
    split, whole = time_split(traces), planned.schedule.sweep_us
    sentences = []
    compute = whole - split["exposed transfers"]
    sentences.append(f"{share(compute, whole)} of the sweep are compute, {share(split['exposed transfers'], whole)} wait for copies.")
    if split["exposed transfers"] > _SMALL * whole:
        sentences.append(_copies(planned))
    if split["recompute"] > _SMALL * whole:
        sentences.append(
            f"{share(split['recompute'], whole)} are computed a second time in backward: options that save more do not fit beside the rest."
        )
    count = len(traces)
    if count > 1:
        sentences.append(
            f"Each of {steps_word(count)} has a forward of its own: {share(split['forward'], whole)} of the sweep are forward."
        )
    return Section(f"Why {format_us(whole)} per sweep", tuple(sentences), (time_table(split),))


def _copies(planned: Plan) -> str:
    """What moves, and whether anything could hide it."""
    away = {
        what: sum(nbytes for place, nbytes in sizes.items() if place is not Placement.DEVICE) for what, sizes in by_place(planned).items()
    }
    state = transfer_us(planned.problem, planned.schedule.places)
    parts = [f"{format_nbytes(nbytes)} of {what}" for what, nbytes in away.items() if nbytes]
    text = (
        f"Away from the device are {' and '.join(parts) or 'saved values only'}; moving all of the state there and back takes "
        f"{format_us(state)} per sweep"
    )
    if any(link.overlaps for link in planned.problem.links):
        return f"{text}, beside compute as far as that is long enough."
    return f"{text}. Nothing hides it: this plan does not count on copies beside compute."


def levers(planned: Plan, traces: Sequence[Trace]) -> Section:
    """Other sweeps of the same chunks, beside this plan."""
    problem, schedule = planned.problem, planned.schedule
    count, bound = len(schedule.steps), bound_of(planned)
    rows = [_row("this plan", schedule, time_split(traces))]
    if bound is not None and planned.lowered:
        rows.append(_sketched("this plan, by the planner's bound", problem, bound))
    larger = [in_fewer_steps(planned, most, _SECONDS) for most in _fewer(count)]
    if count == 1:
        larger = [sketch(replace(problem, budget_nbytes=int(factor * schedule.budget_nbytes))) for factor in _MORE]
    for found in larger:
        if found is not None:
            more = format_nbytes(found.budget_nbytes - schedule.budget_nbytes, up=True)
            rows.append(_sketched(f"{more} more", problem, found))
    us = schedule.sweep_us if bound is None else bound.sweep_us
    for what, other in forbidden(planned).items():
        found = sketch(other)
        if found is not None and (found.sweep_us < (1 - _SMALL) * us or len(found.steps) < count):
            rows.append(_sketched(f"{what} ({how(planned, what)})", other, found))
    sentence = "Found without a search and with the chunks of this plan, by the planner's bound: planning anew may find better ones."
    headers = ("with", "budget", "T", "per sweep", "exposed transfers", "recompute")
    return Section("What would change T and time", (sentence,), (Table(headers, tuple(dict.fromkeys(rows))),))


def _fewer(count: int) -> list[int]:
    """Numbers of steps to look for below `count`: one less or half as many, and one."""
    return sorted({count - 1 if count <= 4 else count // 2, max(1, count // 10), 1} - {0, count}, reverse=True)


def _sketched(what: str, problem: Problem, schedule: Schedule) -> tuple[str, ...]:
    return _row(what, schedule, time_split(trace_bound(problem, step, schedule.places) for step in schedule.steps))


def _row(what: str, schedule: Schedule, split: dict[str, int]) -> tuple[str, ...]:
    times = (schedule.sweep_us, split["exposed transfers"], split["recompute"])
    return what, format_nbytes(schedule.budget_nbytes, up=True), str(len(schedule.steps)), *map(format_us, times)
