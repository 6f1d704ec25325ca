"""An independent check of a schedule. Shares no code with what makes schedules: it works from the notes of `problem`.

Where the planner carries sums upwards through the segments, this file asks at every moment for every byte "are you there?".
"""

import math
from dataclasses import dataclass

from chunkft_compile.planner.problem import Cost, Link, Placement, Problem, Role, Schedule, Step, Update

STATUSES = ("OPTIMAL", "FEASIBLE", "GREEDY")


class VerifyError(AssertionError):
    """A schedule breaks a promise: a bug of the planner, or a schedule for another problem."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """A problem and the links behind the places of a schedule (None: the device)."""

    problem: Problem
    state: list[Link | None]
    weights: list[Link | None]
    always_nbytes: int


def verify(problem: Problem, schedule: Schedule, *, lowered: bool = False) -> None:
    """Raise `VerifyError` unless the schedule trains every chunk once, fits the budget at every moment and states its costs.

    `lowered` schedules carry the exact peaks and times of their programs, which need not equal the bound.
    """
    _check(schedule.budget_nbytes == problem.budget_nbytes, f"is for {schedule.budget_nbytes} bytes, the budget is {problem.budget_nbytes}")
    _check(schedule.status in STATUSES, f"has the unknown status {schedule.status!r}")
    _check(math.isfinite(schedule.gap) and 0 <= schedule.gap <= 1, f"has a gap of {schedule.gap}")
    _verify_chunks(problem, schedule)
    setting = _verify_places(problem, schedule)
    for number, step in enumerate(schedule.steps):
        _verify_step(setting, step, f"step {number}", lowered)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise VerifyError(f"the schedule {what}")


def _verify_chunks(problem: Problem, schedule: Schedule) -> None:
    everything = set(range(len(problem.chunks)))
    seen: dict[int, int] = {}
    for number, step in enumerate(schedule.steps):
        _check(step.update in problem.updates, f"wants {step.update} updates in step {number}; allowed: {', '.join(problem.updates)}")
        for chunk in step.chunks:
            _check(chunk in everything, f"trains chunk {chunk} in step {number}, there are {len(problem.chunks)}")
            _check(chunk not in seen, f"trains {problem.chunks[chunk].name} in step {seen.get(chunk)} and again in step {number}")
            seen[chunk] = number
    missing = sorted(everything - set(seen))
    _check(not missing, f"never trains {', '.join(problem.chunks[index].name for index in missing)}")


def _verify_places(problem: Problem, schedule: Schedule) -> _Setting:
    """Places that exist, are allowed and hold what is put there."""
    places = schedule.places
    _check(len(places.state) == len(problem.chunks), f"places the state of {len(places.state)} chunks of {len(problem.chunks)}")
    _check(len(places.weights) == len(problem.segments), f"places the weights of {len(places.weights)} segments of {len(problem.segments)}")
    by_place = {link.placement: link for link in problem.links}
    state = [by_place.get(place) for place in places.state]
    weights = [by_place.get(place) for place in places.weights]
    stored: dict[Placement, int] = {}
    for chunk, place in zip(problem.chunks, places.state, strict=True):
        _check(place is Placement.DEVICE or place in by_place, f"puts state on the {place}, to which there is no link")
        _check(place in problem.state or not chunk.state_nbytes, f"puts the state of {chunk.name} on the {place}, which is not allowed")
        stored[place] = stored.get(place, 0) + chunk.state_nbytes
    for segment, place in zip(problem.segments, places.weights, strict=True):
        _check(place is Placement.DEVICE or place in by_place, f"puts weights on the {place}, to which there is no link")
        allowed = place in problem.weights or (place is Placement.DEVICE and not segment.weight_nbytes)
        _check(allowed, f"puts the weights of {segment.name} on the {place}, which is not allowed")
        stored[place] = stored.get(place, 0) + segment.weight_nbytes
    for link in problem.links:
        there = stored.get(link.placement, 0)
        _check(link.capacity_nbytes is None or there <= link.capacity_nbytes, f"puts {there} bytes on the {link.placement}")
    always = problem.static_nbytes + stored.get(Placement.DEVICE, 0)
    always -= sum(segment.weight_nbytes for segment in problem.segments)
    buffers = [segment.weight_nbytes * (1 + link.overlaps) for segment, link in zip(problem.segments, weights, strict=True) if link]
    return _Setting(problem, state, weights, always + max(buffers, default=0))


def _verify_step(setting: _Setting, step: Step, name: str, lowered: bool) -> None:
    problem = setting.problem
    roles = _expected_roles(problem, step)
    costs = _named_costs(problem, step, name, roles)
    moments = [*_forward_moments(setting, step, costs), *_backward_moments(setting, step, costs), *_update_moments(setting, step, costs)]
    for moment, nbytes in moments:
        _check(nbytes <= problem.budget_nbytes, f"needs {nbytes} bytes in {name} at {moment}, the budget is {problem.budget_nbytes}")
    if lowered:
        _check(step.peak_nbytes <= problem.budget_nbytes, f"states a peak of {step.peak_nbytes} bytes in {name}, above the budget")
        return
    bound = max(nbytes for _, nbytes in moments)
    _check(step.peak_nbytes == bound, f"states a peak of {step.peak_nbytes} bytes in {name}, the bound is {bound}")
    us = _expected_us(setting, step, roles, costs)
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


def _forward_moments(setting: _Setting, step: Step, costs: list[Cost]) -> list[tuple[str, int]]:
    problem = setting.problem
    waiting = sum(problem.chunks[index].grad_nbytes for index in step.chunks) if problem.accumulating else 0
    moments = []
    for s, segment in enumerate(problem.segments):
        kept = sum(cost.saved_nbytes for cost in costs[:s])
        nbytes = setting.always_nbytes + waiting + kept + segment.entry_nbytes + costs[s].forward_peak_nbytes
        moments.append((f"forward {segment.name}", nbytes))
    return moments


def _grads_nbytes(problem: Problem, step: Step, s: int) -> int:
    """Gradients live while segment `s` runs backward, and right after it."""
    nbytes = 0
    for chunk in (problem.chunks[index] for index in step.chunks):
        on_its_way = chunk.segment <= s <= chunk.first
        if problem.accumulating:
            nbytes += chunk.grad_nbytes * (2 if on_its_way else 1)
        elif on_its_way or (step.update == Update.HELD and chunk.first >= s):
            nbytes += chunk.grad_nbytes
    return nbytes


def _backward_moments(setting: _Setting, step: Step, costs: list[Cost]) -> list[tuple[str, int]]:
    problem = setting.problem
    moments = []
    for s, segment in enumerate(problem.segments):
        if any(problem.chunks[index].segment <= s for index in step.chunks):
            nbytes = setting.always_nbytes + segment.arriving_nbytes + costs[s].backward_peak_nbytes + costs[s].offloaded_nbytes
            nbytes += sum(cost.saved_nbytes for cost in costs[: s + 1]) + _grads_nbytes(problem, step, s)
            moments.append((f"backward {segment.name}", nbytes))
    return moments


def _update_moments(setting: _Setting, step: Step, costs: list[Cost]) -> list[tuple[str, int]]:
    """Each chunk's update; `update_nbytes` contains its state, so resident state of its own is taken off."""
    problem = setting.problem
    lowest = min(problem.chunks[index].segment for index in step.chunks)
    moments = []
    for index in step.chunks:
        chunk, link = problem.chunks[index], setting.state[index]
        own = chunk.update_nbytes + (0 if link is None else chunk.state_nbytes if link.overlaps else 0)
        own -= chunk.state_nbytes if link is None else 0
        if step.update == Update.HELD:
            beside = sum(problem.chunks[other].grad_nbytes for other in step.chunks)
        else:
            s = chunk.segment
            beside = _grads_nbytes(problem, step, s) + sum(cost.saved_nbytes for cost in costs[:s])
            beside += problem.segments[s - 1].arriving_nbytes if s > lowest else 0
        moments.append((f"update of {chunk.name}", setting.always_nbytes + beside + own))
    return moments


def _expected_us(setting: _Setting, step: Step, roles: list[Role], costs: list[Cost]) -> int:
    """Compute and transfers, segment by segment and direction by direction."""
    problem, us = setting.problem, 0
    for s, (role, cost) in enumerate(zip(roles, costs, strict=True)):
        own, beside = setting.weights[s], problem.links[0]
        size = problem.segments[s].weight_nbytes
        fetch = [(own, own.read_us(size))] if own else []
        away = cost.offloaded_nbytes
        us += _together(cost.forward_us, [*fetch, *([(beside, beside.write_us(away))] if away else [])])
        if role == Role.FROZEN:
            continue
        compute, moves = cost.backward_us, [*fetch, *([(beside, beside.read_us(away))] if away else [])]
        for index in step.chunks:
            if problem.chunks[index].segment == s:
                compute += problem.chunks[index].grad_us
                if step.update == Update.IMMEDIATE:
                    compute += problem.chunks[index].update_us
                    moves += _update_moves(setting, index, weights_come=False)
        us += _together(compute, moves)
    if step.update == Update.HELD:
        moves = [move for index in step.chunks for move in _update_moves(setting, index, weights_come=True)]
        us += _together(sum(problem.chunks[index].update_us for index in step.chunks), moves)
    return us


def _update_moves(setting: _Setting, index: int, *, weights_come: bool) -> list[tuple[Link, int]]:
    chunk = setting.problem.chunks[index]
    state, weights = setting.state[index], setting.weights[chunk.segment]
    moves = [(state, state.read_us(chunk.state_nbytes) + state.write_us(chunk.state_nbytes))] if state else []
    if weights:
        come = weights.read_us(chunk.weight_nbytes) if weights_come else 0
        moves.append((weights, come + weights.write_us(chunk.weight_nbytes)))
    return moves


def _together(compute_us: int, moves: list[tuple[Link, int]]) -> int:
    beside = sum(us for link, us in moves if link.overlaps)
    return sum(us for link, us in moves if not link.overlaps) + max(compute_us, beside)
