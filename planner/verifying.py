"""An independent check of a schedule. Shares no code with what makes schedules: it works from the docstring of `problem`.

Where the planner carries sums upwards through the segments, this file asks at every moment for every byte "are you there?".
"""

import math

from chunkft_compile.planner.problem import Cost, Problem, Role, Schedule, Step

STATUSES = ("OPTIMAL", "FEASIBLE", "GREEDY")


class VerifyError(AssertionError):
    """A schedule breaks a promise: a bug of the planner, or a schedule for another problem."""


def verify(problem: Problem, schedule: Schedule, *, lowered: bool = False) -> None:
    """Raise `VerifyError` unless the schedule trains every chunk once, fits the budget at every moment and states its costs.

    `lowered` schedules carry the exact peaks of their programs, which need not equal the bound.
    """
    _check(schedule.budget_nbytes == problem.budget_nbytes, f"is for {schedule.budget_nbytes} bytes, the budget is {problem.budget_nbytes}")
    _check(schedule.status in STATUSES, f"has the unknown status {schedule.status!r}")
    _check(math.isfinite(schedule.gap) and 0 <= schedule.gap <= 1, f"has a gap of {schedule.gap}")
    _verify_chunks(problem, schedule)
    resident = sum(problem.chunks[index].state_nbytes for index in schedule.resident)
    for number, step in enumerate(schedule.steps):
        _verify_step(problem, step, f"step {number}", resident, set(schedule.resident), lowered)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise VerifyError(f"the schedule {what}")


def _verify_chunks(problem: Problem, schedule: Schedule) -> None:
    everything = set(range(len(problem.chunks)))
    seen: dict[int, int] = {}
    for number, step in enumerate(schedule.steps):
        for chunk in step.chunks:
            _check(chunk in everything, f"trains chunk {chunk} in step {number}, there are {len(problem.chunks)}")
            _check(chunk not in seen, f"trains {problem.chunks[chunk].name} in step {seen.get(chunk)} and again in step {number}")
            seen[chunk] = number
    missing = sorted(everything - set(seen))
    _check(not missing, f"never trains {', '.join(problem.chunks[index].name for index in missing)}")
    places = schedule.places
    _check(len(places.state) == len(problem.chunks), f"places the state of {len(places.state)} chunks of {len(problem.chunks)}")
    _check(len(places.weights) == len(problem.segments), f"places the weights of {len(places.weights)} segments of {len(problem.segments)}")


def _verify_step(problem: Problem, step: Step, name: str, resident_nbytes: int, resident: set[int], lowered: bool) -> None:
    roles = _expected_roles(problem, step)
    costs = _named_costs(problem, step, name, roles)
    moments = [*_forward_moments(problem, step, costs), *_backward_moments(problem, step, costs)]
    updates = _update_moments(problem, step, resident)
    for moment, nbytes in [*moments, *updates]:
        total = nbytes + resident_nbytes
        _check(total <= problem.budget_nbytes, f"needs {total} bytes in {name} at {moment}, the budget is {problem.budget_nbytes}")
    if lowered:
        _check(step.peak_nbytes <= problem.budget_nbytes, f"states a peak of {step.peak_nbytes} bytes in {name}, above the budget")
    else:
        bound = max(nbytes for _, nbytes in [*moments, *_update_moments(problem, step, set())])
        _check(step.peak_nbytes == bound, f"states a peak of {step.peak_nbytes} bytes in {name}, the bound is {bound}")
    us = sum(problem.chunks[index].grad_us for index in step.chunks)
    for role, cost in zip(roles, costs, strict=True):
        us += cost.forward_us if role == Role.FROZEN else cost.forward_us + cost.backward_us
    _check(step.us == us, f"states {step.us} us for {name}, its options take {us}")


def _expected_roles(problem: Problem, step: Step) -> list[Role]:
    chunks = [problem.chunks[index] for index in step.chunks]
    roles = []
    for s in range(len(problem.segments)):
        reached = any(chunk.segment <= s for chunk in chunks)
        last = reached and not any(chunk.segment < s for chunk in chunks)
        works = any(s == chunk.segment or s == chunk.first for chunk in chunks)
        roles.append(Role.LAST if last else Role.FROZEN if not reached else Role.ACTIVE if works else Role.PASS)
    return roles


def _named_costs(problem: Problem, step: Step, name: str, roles: list[Role]) -> list[Cost]:
    _check(len(step.options) == len(problem.segments), f"has {len(step.options)} options in {name} for {len(problem.segments)} segments")
    found = []
    for segment, role, option in zip(problem.segments, roles, step.options, strict=True):
        matching = [cost for cost in problem.kinds[segment.kind].options(role) if cost.option == option]
        _check(bool(matching), f"wants option {option!r} for {segment.name} in {name}, whose role {role} has none of that name")
        found.append(matching[0])
    return found


def _forward_moments(problem: Problem, step: Step, costs: list[Cost]) -> list[tuple[str, int]]:
    waiting = sum(problem.chunks[index].grad_nbytes for index in step.chunks) if problem.accumulating else 0
    moments = []
    for s, segment in enumerate(problem.segments):
        kept = sum(cost.saved_nbytes for cost in costs[:s])
        nbytes = problem.static_nbytes + waiting + kept + segment.entry_nbytes + costs[s].forward_peak_nbytes
        moments.append((f"forward {segment.name}", nbytes))
    return moments


def _backward_moments(problem: Problem, step: Step, costs: list[Cost]) -> list[tuple[str, int]]:
    chunks = [problem.chunks[index] for index in step.chunks]
    moments = []
    for s, segment in enumerate(problem.segments):
        if not any(chunk.segment <= s for chunk in chunks):
            continue
        nbytes = problem.static_nbytes + segment.arriving_nbytes + costs[s].backward_peak_nbytes
        nbytes += sum(cost.saved_nbytes for cost in costs[: s + 1])
        for chunk in chunks:
            if problem.accumulating:
                nbytes += chunk.grad_nbytes * (2 if chunk.segment <= s <= chunk.first else 1)
            elif chunk.first >= s:
                nbytes += chunk.grad_nbytes
        moments.append((f"backward {segment.name}", nbytes))
    return moments


def _update_moments(problem: Problem, step: Step, resident: set[int]) -> list[tuple[str, int]]:
    """Each chunk's update; `update_nbytes` contains its state, so resident state of its own is taken off."""
    gradients = sum(problem.chunks[index].grad_nbytes for index in step.chunks)
    moments = []
    for index in step.chunks:
        chunk = problem.chunks[index]
        own = chunk.update_nbytes - (chunk.state_nbytes if index in resident else 0)
        moments.append((f"update of {chunk.name}", problem.static_nbytes + gradients + own))
    return moments
