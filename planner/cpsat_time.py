"""NOTE [time of a step] of `problem` as the objective of the CP-SAT model.

Where no link overlaps, every term is linear and what each chunk costs wherever it is trained is left out as a constant. Where
one does, a variable per segment and direction is at least its compute and at least its hidden transfers. What weights that are away
cost when they are updated is left out: the bound stays a bound.
"""

from dataclasses import dataclass, field

from chunkft_compile.planner.cpsat_model import ANYWHERE, Expression, Model, StepVariables, total
from chunkft_compile.planner.grounds import Transfer, fetch_over, offload
from chunkft_compile.planner.problem import Link, Role, Update

_SCALE = 1000  # a unit of bytes may take less than a microsecond


@dataclass(slots=True)
class _Phase:
    """Terms of one segment in one direction, or of a HELD update. `spared` are hidden transfers that do not happen, times `_SCALE`."""

    compute: list[Expression] = field(default_factory=list)
    hidden: list[Expression] = field(default_factory=list)
    exposed: list[Expression] = field(default_factory=list)
    spared: list[Expression] = field(default_factory=list)

    def add(self, transfer: Transfer, literal: Expression) -> None:
        """A transfer that happens if `literal` is 1 (or so many times)."""
        if transfer.hidden_us:
            self.hidden.append(transfer.hidden_us * literal)
        if transfer.exposed_us:
            self.exposed.append(transfer.exposed_us * literal)


def overlapping(model: Model) -> bool:
    """Whether any transfer of this problem can hide behind compute."""
    return any(link.overlaps for link in model.problem.links)


def constant_us(model: Model) -> int:
    """What the objective leaves out: the time of gradients, updates and state that does not depend on who is trained when."""
    moves = sum(move.exposed_us for move in model.ground.state_moves)
    own = sum(chunk.grad_us + chunk.update_us for chunk in model.problem.chunks)
    return moves if overlapping(model) else moves + own


def sweep_us(model: Model) -> Expression:
    """The objective: microseconds of a sweep, less `constant_us`."""
    return total(_step_us(model, step, number) for number, step in enumerate(model.steps)) - _saved_us(model)


def _saved_us(model: Model) -> Expression:
    """What state that stays saves of exposed transfers."""
    stays = [(_rate(model, s, hidden=False), amount) for (_, s), amount in model.stays.items()]
    most = sum(move.exposed_us for move in model.ground.state_moves)
    saved = model.cp.new_int_var(0, most, "saved_us")
    model.cp.add(_SCALE * saved <= total(rate * amount for rate, amount in stays))
    return saved


def _rate(model: Model, segment: int, *, hidden: bool) -> int:
    """Microseconds to move a unit of state there and back, times `_SCALE`, rounded up: of the links of a segment's chunks the slowest."""
    chunks = zip(model.problem.chunks, model.ground.places.state, strict=True)
    places = {place for chunk, place in chunks if segment in (chunk.segment, ANYWHERE)}
    links = [link for link in model.problem.links if link.placement in places and link.overlaps == hidden]
    nbytes = model.unit_nbytes * _SCALE
    return max((link.read_us(nbytes) + link.write_us(nbytes) for link in links), default=0)


def rounding_us(model: Model) -> int:
    """By so much may state that stays save more than the rates say: the times of a chunk's transfers are rounded up."""
    return 2 * len(model.problem.chunks) if model.stays else 0


def _step_us(model: Model, step: StepVariables, number: int) -> Expression:
    terms = []
    for s in range(len(model.problem.segments)):
        forward, backward = _forward(model, step, s), _backward(model, step, s)
        applied = _applied(model, step, number, s) if overlapping(model) else None
        terms.append(_duration(model, forward, f"forward_us_{number}_{s}"))
        terms.append(_duration(model, backward, f"backward_us_{number}_{s}", applied, step))
    if overlapping(model) and Update.HELD in model.problem.updates:
        terms.append(_held_us(model, step, number))
    return total(terms)


def _forward(model: Model, step: StepVariables, s: int) -> _Phase:
    phase = _Phase()
    for role in Role:
        for cost, literal in step.picks[s, role]:
            phase.compute.append(cost.forward_us * literal)
            phase.add(offload(model.problem, cost.offloaded_nbytes)[0], literal)
    for link in model.links:
        if (s, link.placement) in model.away:
            fetch = fetch_over(link, model.problem.segments[s].weight_nbytes)
            # in every step that is used; a step without chunks costs nothing, so its literal is bounded from below only
            phase.add(fetch, _visits(model, step, s, link))
    return phase


def _visits(model: Model, step: StepVariables, s: int, link: Link) -> Expression:
    visits = model.cp.new_bool_var(f"visits_{s}_{link.placement}")
    model.cp.add(visits >= model.away[s, link.placement] + step.reaches[-1] - 1)
    return visits


def _backward(model: Model, step: StepVariables, s: int) -> _Phase:
    phase = _Phase()
    for role in (Role.PASS, Role.ACTIVE, Role.LAST):
        for cost, literal in step.picks[s, role]:
            phase.compute.append(cost.backward_us * literal)
            phase.add(offload(model.problem, cost.offloaded_nbytes)[1], literal)
    for link in model.links:
        if (s, link.placement) in model.away:
            phase.add(fetch_over(link, model.problem.segments[s].weight_nbytes), step.returns[s, link.placement])
    if overlapping(model):
        for g, members in enumerate(model.groups):
            if model.chunk(g).segment == s:
                phase.compute.append(_mean(model, members, "grad_us") * step.counts[g])
    return phase


def _applied(model: Model, step: StepVariables, number: int, s: int) -> _Phase:
    """What IMMEDIATE updates add to the backward of a segment."""
    phase = _Phase()
    if Update.IMMEDIATE in model.problem.updates:
        for g, members in enumerate(model.groups):
            if model.chunk(g).segment == s:
                phase.compute.append(_mean(model, members, "update_us") * step.counts[g])
                phase.add(Transfer(model.ground.state_moves[members[0]].hidden_us), step.counts[g])
        if (number, s) in model.stays:
            phase.spared.append(_rate(model, s, hidden=True) * model.stays[number, s])
    return phase


def _held_us(model: Model, step: StepVariables, number: int) -> Expression:
    phase = _Phase()
    for g, members in enumerate(model.groups):
        phase.compute.append(_mean(model, members, "update_us") * step.counts[g])
        phase.add(Transfer(model.ground.state_moves[members[0]].hidden_us), step.counts[g])
    spared = total(_rate(model, s, hidden=True) * amount for (t, s), amount in model.stays.items() if t == number)
    held = model.cp.new_int_var(0, _longest(model), f"held_us_{number}")
    for bound in (
        model.cp.add(held >= total(phase.compute)),
        model.cp.add(_SCALE * held + spared >= _SCALE * total(phase.hidden)),
    ):
        if step.immediate is not None:
            bound.only_enforce_if(~step.immediate)
    return held


def _duration(model: Model, phase: _Phase, name: str, applied: _Phase | None = None, step: StepVariables | None = None) -> Expression:
    """Exposed transfers, and the longer of compute and hidden transfers."""
    if not phase.hidden and (applied is None or not applied.compute + applied.hidden):
        return total(phase.compute) + total(phase.exposed)
    us = model.cp.new_int_var(0, _longest(model), name)
    compute, hidden = total(phase.compute), total(phase.hidden)
    model.cp.add(us >= compute)
    model.cp.add(us >= hidden)
    if applied is not None and step is not None:
        for more in (
            model.cp.add(us >= compute + total(applied.compute)),
            model.cp.add(_SCALE * us + total(applied.spared) >= _SCALE * (hidden + total(applied.hidden))),
        ):
            if step.immediate is not None:
                more.only_enforce_if(step.immediate)
    return us + total(phase.exposed)


def _mean(model: Model, members: list[int], what: str) -> int:
    """Rounded down, so that the bound stays one."""
    return sum(int(getattr(model.problem.chunks[index], what)) for index in members) // len(members)


def _longest(model: Model) -> int:
    """More than any segment takes in any direction."""
    problem = model.problem
    compute = sum(max(cost.forward_us + cost.backward_us for cost in problem.kinds[s.kind].costs) for s in problem.segments)
    chunks = sum(chunk.grad_us + chunk.update_us for chunk in problem.chunks)
    moves = sum(move.hidden_us for move in model.ground.state_moves)
    weights = sum(link.read_us(s.weight_nbytes) for s in problem.segments for link in problem.links)
    saved = sum(sum(t.hidden_us for t in offload(problem, cost.offloaded_nbytes)) for k in problem.kinds for cost in k.costs)
    return compute + chunks + moves + 2 * weights + saved
