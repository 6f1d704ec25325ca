"""The schedule as a CP-SAT model. This file alone knows OR-Tools.

NOTE [the model]
Steps are sorted by depth, deepest first, unused ones last. `reaches[t, s]` says that the backward of step `t` runs segment `s`;
it is monotone in both, and every role is linear in it:

    FROZEN = used - reaches[s]    LAST = reaches[s] - reaches[s-1]    ACTIVE + PASS = reaches[s-1]

Equal chunks are interchangeable, so a step holds a *number* of each group of them. Saved bytes are prefix sums and gradients
suffix sums, both variables of their own, which keeps every memory constraint as short as one segment.

NOTE [steps that must be deep]
A chunk of segment `<= s` needs a step that reaches `s`, and such a step carries a bounded number of gradient bytes. So at least
`fewest_steps(s)` steps reach `s`; steps being sorted, these literals are simply true. This is most of the proof of optimality:
without it the relaxation spreads the depth thinly over all steps (34 segments, 392 chunks: gap 10 % instead of 2 %).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ortools.sat.python import cp_model

from chunkft_compile.planner.bounds import choose_options, cost_us, costs_of, depth_of, emits, make_step, passes, roles_of
from chunkft_compile.planner.limits import beats, fewest_steps, most_gradients, undominated
from chunkft_compile.planner.problem import Chunk, Cost, Problem, Role, Step

# CP-SAT's presolve and cuts work best with coefficients far from int64's edge: bytes are counted in units that leave the budget
# below this. Costs are rounded up and the budget down, so a plan in units is a plan in bytes.
LARGEST_BUDGET_UNITS = 1 << 26

GAP = 0.002  # seconds spent below this gap are worth more than what they can still find
# CP-SAT's deterministic seconds per second of the limit. On two busy cores one of them took 5 to 20 real seconds.
DETERMINISTIC_RATE = 0.08
WALL_FACTOR = 2.0  # so that a busy machine still ends by work done, not by the clock

NOTHING = cp_model.LinearExpr.sum([])


@dataclass(frozen=True, slots=True)
class StepVariables:
    """One step. `counts[g]` chunks of group `g`; `picks[s, role]` pairs each option with its literal (or 0/1 expression)."""

    reaches: list[cp_model.IntVar]
    counts: list[cp_model.IntVar]
    picks: dict[tuple[int, Role], list[tuple[Cost, cp_model.LinearExpr]]]
    active: list[cp_model.IntVar]
    saved: list[cp_model.IntVar]
    gradients: list[cp_model.IntVar]
    update_levels: list[cp_model.IntVar]


@dataclass(frozen=True, slots=True)
class Model:
    """The model and what is needed to read its answer."""

    cp: cp_model.CpModel
    problem: Problem
    groups: list[list[int]]
    unit_nbytes: int
    steps: list[StepVariables] = field(default_factory=list)

    def chunk(self, group: int) -> Chunk:
        """Any chunk of a group: they are equal."""
        return self.problem.chunks[self.groups[group][0]]

    def units(self, nbytes: int) -> int:
        """Bytes in units, rounded up."""
        return -(-nbytes // self.unit_nbytes)

    @property
    def room(self) -> int:
        """What the budget leaves above the static bytes, in units, rounded down."""
        return (self.problem.budget_nbytes - self.problem.static_nbytes) // self.unit_nbytes

    @property
    def levels(self) -> list[int]:
        """The distinct sizes of an update, ascending, in units."""
        return sorted({self.units(self.chunk(g).update_nbytes) for g in range(len(self.groups))})


def build(problem: Problem, groups: list[list[int]], hint: Sequence[Step], *, max_steps: int) -> Model:
    """The model of at most `max_steps` steps, hinted by a plan that needs no more. `groups` are chunks that differ in nothing here."""
    assert len(hint) <= max_steps, f"the hint has {len(hint)} steps, the model {max_steps}"
    unit = 1
    while problem.budget_nbytes // unit > LARGEST_BUDGET_UNITS:
        unit *= 2
    model = Model(cp_model.CpModel(), problem, groups, unit)
    for number in range(max_steps):
        model.steps.append(_new_step(model, number))
        _constrain_roles(model, model.steps[-1])
        _constrain_memory(model, model.steps[-1])
    _train_every_chunk(model)
    _order_steps(model)
    model.cp.minimize(_sum(_step_us(step) for step in model.steps))
    for number, step in enumerate(model.steps):
        _hint_step(model, step, hint[number] if number < len(hint) else None)
    return model


def _new_step(model: Model, number: int) -> StepVariables:
    cp, room = model.cp, max(model.room, 0)
    segments = range(len(model.problem.segments))
    reaches = [cp.new_bool_var(f"reaches_{number}_{s}") for s in segments]
    active = [cp.new_bool_var(f"active_{number}_{s}") for s in segments]
    counts = []
    for g, members in enumerate(model.groups):
        most = (room - model.units(model.chunk(g).update_nbytes)) // model.units(model.chunk(g).grad_nbytes)
        counts.append(cp.new_int_var(0, max(0, min(len(members), most)), f"count_{number}_{g}"))
    step = StepVariables(
        reaches=reaches,
        counts=counts,
        picks={},
        active=active,
        saved=[cp.new_int_var(0, room, f"saved_{number}_{s}") for s in segments],
        gradients=[cp.new_int_var(0, room, f"gradients_{number}_{s}") for s in segments],
        update_levels=[cp.new_bool_var(f"update_{number}_{i}") for i in range(len(model.levels))],
    )
    for s in segments:
        for role, happens in _roles(step, s).items():
            step.picks[s, role] = _pick(model, happens, undominated(model.problem.costs(s, role), role), f"{number}_{s}_{role}")
    return step


def _roles(step: StepVariables, s: int) -> dict[Role, cp_model.LinearExpr]:
    """0/1 expressions: which role segment `s` has (none in an unused step)."""
    used, here, below = step.reaches[-1], step.reaches[s], _below(step.reaches, s)
    return {Role.FROZEN: used - here, Role.LAST: here - below, Role.ACTIVE: step.active[s], Role.PASS: below - step.active[s]}


def _pick(model: Model, happens: cp_model.LinearExpr, costs: list[Cost], name: str) -> list[tuple[Cost, cp_model.LinearExpr]]:
    """One literal per option, of which exactly one is true if the role happens. A single option needs none."""
    if len(costs) == 1:
        return [(costs[0], happens)]
    literals = [model.cp.new_bool_var(f"pick_{name}_{cost.option}") for cost in costs]
    model.cp.add(_sum(literals) == happens)
    return list(zip(costs, literals, strict=True))


def _constrain_roles(model: Model, step: StepVariables) -> None:
    """Roles follow from the chunks, in both directions: no segment may call itself ACTIVE because that is cheaper."""
    cp = model.cp
    for s, reaches in enumerate(step.reaches):
        below = _below(step.reaches, s)
        cp.add(below <= reaches)
        cp.add(step.active[s] <= below)
        emitting = [g for g in range(len(model.groups)) if emits(model.chunk(g), s)]
        lowest = [step.counts[g] for g in emitting if model.chunk(g).segment == s]
        cp.add(step.active[s] <= _sum(step.counts[g] for g in emitting))
        cp.add(reaches - below <= _sum(lowest))
        for g in emitting:
            most = _largest(step.counts[g])
            cp.add(step.counts[g] <= most * (reaches - below + step.active[s]))
            if model.chunk(g).segment < s:  # the LAST above must not stand in for the lower half of a tied weight
                cp.add(step.counts[g] <= most * step.reaches[model.chunk(g).segment])


def _constrain_memory(model: Model, step: StepVariables) -> None:
    """The bound of `problem`, moment by moment, in units."""
    cp, room, accumulating = model.cp, model.room, model.problem.accumulating
    grads = [count * model.units(model.chunk(g).grad_nbytes) for g, count in enumerate(step.counts)]
    total = _sum(grads)
    frozen_saved = 0
    for s, segment in enumerate(model.problem.segments):
        saved_below = _below(step.saved, s)
        picks = [(role, cost, literal) for role in Role for cost, literal in step.picks[s, role]]
        cp.add(step.saved[s] == saved_below + _sum(model.units(cost.saved_nbytes) * literal for _, cost, literal in picks))
        entering = _sum(model.units(segment.entry_nbytes + cost.forward_peak_nbytes) * literal for _, cost, literal in picks)
        cp.add(saved_below + entering + (total if accumulating else NOTHING) <= room)
        emitted = _sum(grad for g, grad in enumerate(grads) if (passes(model.chunk(g), s) if accumulating else model.chunk(g).first == s))
        above = total if accumulating else _sum(step.gradients[s + 1 : s + 2])
        cp.add(step.gradients[s] == above + emitted)
        leaving = _sum(
            model.units(segment.arriving_nbytes + cost.backward_peak_nbytes) * literal
            for role, cost, literal in picks
            if role is not Role.FROZEN
        )
        # Where no backward runs, only bytes that frozen segments save could break this: allow for them (mostly none).
        frozen_saved += max(model.units(cost.saved_nbytes) for cost, _ in step.picks[s, Role.FROZEN])
        cp.add(step.saved[s] + step.gradients[s] + leaving <= room + frozen_saved * (1 - step.reaches[s]))
    _constrain_update(model, step, grads)


def _constrain_update(model: Model, step: StepVariables, grads: list[cp_model.LinearExpr]) -> None:
    """The moment of the optimizer. `update_levels[i]`: the largest update of the step is at least `levels[i]`."""
    cp, room, levels = model.cp, model.room, model.levels
    largest = _sum((level - below) * literal for level, below, literal in zip(levels, [0, *levels], step.update_levels, strict=False))
    cp.add(_sum(grads) + largest <= room * step.reaches[-1])
    for level, literal in zip(levels, step.update_levels, strict=True):
        demanding = [grad for g, grad in enumerate(grads) if model.units(model.chunk(g).update_nbytes) >= level]
        cp.add(_sum(demanding) <= (room - level) * literal)
    for lower, higher in zip(step.update_levels, step.update_levels[1:], strict=False):
        cp.add(higher <= lower)
    for s, reaches in enumerate(step.reaches):  # implied, but the relaxation does not see it
        deep = [g for g in range(len(grads)) if model.chunk(g).segment <= s]
        if deep:
            most = most_gradients(model.problem, s, min(model.chunk(g).update_nbytes for g in deep)) // model.unit_nbytes
            cp.add(_sum(grads[g] for g in deep) <= most * reaches)


def _train_every_chunk(model: Model) -> None:
    for g, members in enumerate(model.groups):
        model.cp.add(_sum(step.counts[g] for step in model.steps) == len(members))


def _order_steps(model: Model) -> None:
    """See NOTE [steps that must be deep]."""
    for step, later in zip(model.steps, model.steps[1:], strict=False):
        for s in range(len(step.reaches)):
            model.cp.add(later.reaches[s] <= step.reaches[s])
    for s in range(len(model.problem.segments)):
        for step in model.steps[: fewest_steps(model.problem, s)]:
            model.cp.add(step.reaches[s] == 1)
    top = len(model.problem.segments) - 1
    for i, level in enumerate(model.levels):
        least = fewest_steps(model.problem, top, (level - 1) * model.unit_nbytes + 1)
        model.cp.add(_sum(step.update_levels[i] for step in model.steps) >= least)


def _step_us(step: StepVariables) -> cp_model.LinearExpr:
    return _sum(cost_us(cost, role) * literal for (_, role), picks in step.picks.items() for cost, literal in picks)


def _below(variables: Sequence[cp_model.IntVar], s: int) -> cp_model.LinearExpr:
    return variables[s - 1] if s else NOTHING


def _sum(terms: Iterable[cp_model.LinearExpr]) -> cp_model.LinearExpr:
    """`sum` without its integer zero, so that the type is always an expression."""
    return cp_model.LinearExpr.sum(list(terms))


def _largest(variable: cp_model.IntVar) -> int:
    return int(list(variable.proto.domain)[-1])  # the wrapper does not support negative indices


def _hint_step(model: Model, step: StepVariables, plan: Step | None) -> None:
    """A value for every variable; those of an unused step are all zero."""
    pairs: list[tuple[cp_model.IntVar, int]]
    if plan is None:
        pairs = [(variable, 0) for variable in _variables(step)]
    else:
        pairs = [*_hint_chunks(model, step, plan), *_hint_options(model, step, plan)]
    for variable, value in pairs:
        model.cp.add_hint(variable, value)


def _variables(step: StepVariables) -> list[cp_model.IntVar]:
    literals = [literal for picks in step.picks.values() if len(picks) > 1 for _, literal in picks if isinstance(literal, cp_model.IntVar)]
    return [*step.reaches, *step.counts, *step.active, *step.saved, *step.gradients, *step.update_levels, *literals]


def _hint_chunks(model: Model, step: StepVariables, plan: Step) -> list[tuple[cp_model.IntVar, int]]:
    problem, depth = model.problem, depth_of(model.problem, plan.chunks)
    chosen = set(plan.chunks)
    counts = [len(chosen & set(members)) for members in model.groups]
    used = [(model.chunk(g), count) for g, count in enumerate(counts) if count]
    pairs = list(zip(step.counts, counts, strict=True))
    total = sum(model.units(chunk.grad_nbytes) * count for chunk, count in used)
    for s in range(len(problem.segments)):
        emitting = [(chunk, count) for chunk, count in used if emits(chunk, s)]
        coming = [(chunk, count) for chunk, count in used if (passes(chunk, s) if problem.accumulating else chunk.first >= s)]
        gradients = sum(model.units(chunk.grad_nbytes) * count for chunk, count in coming)
        pairs += [(step.reaches[s], int(s >= depth)), (step.active[s], int(s > depth and bool(emitting)))]
        pairs.append((step.gradients[s], gradients + (total if problem.accumulating else 0)))
    largest = max(model.units(chunk.update_nbytes) for chunk, _ in used)
    return pairs + [(literal, int(level <= largest)) for literal, level in zip(step.update_levels, model.levels, strict=True)]


def _hint_options(model: Model, step: StepVariables, plan: Step) -> list[tuple[cp_model.IntVar, int]]:
    pairs: list[tuple[cp_model.IntVar, int]] = []
    saved = 0
    roles = roles_of(model.problem, plan.chunks)
    for s, wanted in enumerate(costs_of(model.problem, plan.chunks, plan.options)):
        # The wanted option may have been left out for one that beats it everywhere.
        taken = next(cost for cost, _ in step.picks[s, roles[s]] if beats(cost, wanted, roles[s]))
        saved += model.units(taken.saved_nbytes)
        pairs.append((step.saved[s], saved))
        for role in Role:
            picks = step.picks[s, role]
            if len(picks) > 1:
                pairs += [
                    (literal, int(role is roles[s] and cost is taken)) for cost, literal in picks if isinstance(literal, cp_model.IntVar)
                ]
    return pairs


@dataclass(frozen=True, slots=True)
class Answer:
    """Steps of the bundled problem, the status by name, and the proven lower bound of a sweep in microseconds."""

    steps: tuple[Step, ...]
    status: str
    bound_us: int
    solve_s: float


def solve(model: Model, hint: Sequence[Step], *, time_limit_s: float, seed: int, workers: int, gap: float = GAP) -> Answer:
    """The best steps found, never slower than `hint`.

    The search ends at the relative `gap` (then called OPTIMAL), or after an amount of work: `time_limit_s` times
    `DETERMINISTIC_RATE` of CP-SAT's deterministic time, which workers share by turns (`interleave_search`). So the same problem,
    seed, limit and number of workers give the same schedule, unless the machine is so slow that the net of `WALL_FACTOR` times
    the limit in real seconds ends the search first.
    """
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = time_limit_s * DETERMINISTIC_RATE
    solver.parameters.max_time_in_seconds = time_limit_s * WALL_FACTOR
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = workers
    solver.parameters.interleave_search = True
    solver.parameters.relative_gap_limit = gap
    code = solver.solve(model.cp)
    constant_us = sum(chunk.grad_us for chunk in model.problem.chunks)
    bound_us = constant_us + max(0, math.ceil(solver.best_objective_bound - 1e-6))
    match code:
        case cp_model.OPTIMAL | cp_model.FEASIBLE:
            steps, status = _read_steps(model, solver), solver.status_name(code)
            if sum(step.us for step in steps) > sum(step.us for step in hint):
                steps = tuple(hint)
        case cp_model.UNKNOWN:
            steps, status = tuple(hint), "GREEDY"
        case cp_model.INFEASIBLE:
            raise AssertionError("CP-SAT calls a problem infeasible for which a plan was given as hint")
        case cp_model.MODEL_INVALID:
            raise AssertionError(f"CP-SAT refuses the model: {model.cp.validate()}")
        case _:
            raise AssertionError(f"unknown CP-SAT status {code}")
    return Answer(steps, status, bound_us, solver.wall_time)


def _read_steps(model: Model, solver: cp_model.CpSolver) -> tuple[Step, ...]:
    left = [list(members) for members in model.groups]
    steps = []
    for step in model.steps:
        chunks = sorted(left[g].pop(0) for g, count in enumerate(step.counts) for _ in range(solver.value(count)))
        if chunks:
            steps.append(_fastest(model, solver, step, chunks))
    return tuple(steps)


def _fastest(model: Model, solver: cp_model.CpSolver, step: StepVariables, chunks: list[int]) -> Step:
    """The solver's options, or better ones: when it was stopped early they need not be the best for its chunks."""
    roles = roles_of(model.problem, chunks)
    names = [next(cost.option for cost, literal in step.picks[s, role] if solver.value(literal)) for s, role in enumerate(roles)]
    found = make_step(model.problem, chunks, names)
    options = choose_options(model.problem, chunks, model.problem.budget_nbytes)
    assert options is not None, "the solver's own options fit"
    return min(found, make_step(model.problem, chunks, options), key=lambda step: step.us)
