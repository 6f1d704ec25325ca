"""NOTE [memory of a step] of `problem` as constraints of the CP-SAT model, moment by moment, in units."""

from chunkft_compile.planner.bounds import passes
from chunkft_compile.planner.cpsat_model import NOTHING, Expression, Model, StepVariables, below, largest, total
from chunkft_compile.planner.problem import Cost, Role, Update


def constrain_memory(model: Model, step: StepVariables) -> None:
    """Every moment of a step under the budget."""
    grads = [count * model.units(model.chunk(g).grad_nbytes) for g, count in enumerate(step.counts)]
    everything, room, cp = total(grads), model.room, model.cp
    frozen_saved = 0
    for s, segment in enumerate(model.problem.segments):
        saved_below = below(step.saved, s)
        picks = [(role, cost, literal) for role in Role for cost, literal in step.picks[s, role]]
        cp.add(step.saved[s] == saved_below + total(model.units(cost.saved_nbytes) * literal for _, cost, literal in picks))
        entering = total(model.units(segment.entry_nbytes + cost.forward_peak_nbytes) * literal for _, cost, literal in picks)
        cp.add(saved_below + entering + (everything if model.problem.accumulating else NOTHING) <= room)
        _constrain_gradients(model, step, s, grads)
        leaving = total(
            model.units(segment.arriving_nbytes + cost.backward_peak_nbytes + cost.offloaded_nbytes) * literal
            for role, cost, literal in picks
            if role is not Role.FROZEN
        )
        # Where no backward runs, only bytes that frozen segments save could break this: allow for them (mostly none).
        frozen_saved += max(_saved_units(model, step.picks[s, Role.FROZEN]))
        cp.add(step.saved[s] + step.gradients[s] + leaving <= room + frozen_saved * (1 - step.reaches[s]))
    _constrain_held_update(model, step, grads)
    _constrain_immediate_updates(model, step)


def _saved_units(model: Model, picks: list[tuple[Cost, Expression]]) -> list[int]:
    return [model.units(cost.saved_nbytes) for cost, _ in picks]


def _constrain_gradients(model: Model, step: StepVariables, s: int, grads: list[Expression]) -> None:
    """`gradients[s]` is at least what is live in the backward of `s`; when HELD, what higher segments left comes on top."""
    passing = total(grad for g, grad in enumerate(grads) if passes(model.chunk(g), s))
    if model.problem.accumulating:
        model.cp.add(step.gradients[s] == total(grads) + passing)
        return
    if Update.IMMEDIATE in model.problem.updates:
        model.cp.add(step.gradients[s] >= passing)
    if Update.HELD in model.problem.updates:
        emitted = total(grad for g, grad in enumerate(grads) if model.chunk(g).first == s)
        above = total(step.gradients[s + 1 : s + 2])
        held = model.cp.add(step.gradients[s] >= above + emitted)
        if step.immediate is not None:
            held.only_enforce_if(~step.immediate)


def _constrain_held_update(model: Model, step: StepVariables, grads: list[Expression]) -> None:
    """The moment of the optimizer. `update_levels[i]`: the largest update of the step is at least `levels[i]`."""
    if Update.HELD not in model.problem.updates:
        return
    cp, most, levels = model.cp, model.most_room, model.levels
    window = total((level - lower) * literal for level, lower, literal in zip(levels, [0, *levels], step.update_levels, strict=False))
    held = cp.add(total(grads) + window <= model.room)
    if step.immediate is not None:
        held.only_enforce_if(~step.immediate)
    for level, literal in zip(levels, step.update_levels, strict=True):
        demanding = [g for g in range(len(grads)) if model.update_units(g) >= level]
        if model.capacity.held_only:
            cp.add(total(grads[g] for g in demanding) <= (most - level) * literal)
        else:
            cp.add(total(step.counts[g] for g in demanding) <= sum(largest(step.counts[g]) for g in demanding) * literal)
    for lower, higher in zip(step.update_levels, step.update_levels[1:], strict=False):
        cp.add(higher <= lower)
    if not model.capacity.held_only:
        return
    cp.add(total(grads) + window <= most * step.reaches[-1])
    for s, reaches in enumerate(step.reaches):  # implied, but the relaxation does not see it
        deep = [g for g in range(len(grads)) if model.chunk(g).segment <= s]
        if deep:
            least = min(model.capacity.update_nbytes[model.groups[g][0]] for g in deep)
            cp.add(total(grads[g] for g in deep) <= model.capacity.most_gradients(s, least) // model.unit_nbytes * reaches)


def _constrain_immediate_updates(model: Model, step: StepVariables) -> None:
    """Each group's update inside the backward of its segment, beside the saved values below and the gradients on their way."""
    cp = model.cp
    for g, updating in step.updating.items():
        s = model.chunk(g).segment
        cp.add(step.counts[g] <= largest(step.counts[g]) * updating)
        arriving = model.units(model.problem.segments[s - 1].arriving_nbytes) * step.reaches[s - 1] if s else NOTHING
        moment = cp.add(below(step.saved, s) + arriving + step.gradients[s] + model.update_units(g) * updating <= model.room)
        if step.immediate is not None:
            moment.only_enforce_if(step.immediate)
