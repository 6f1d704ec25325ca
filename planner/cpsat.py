"""Build the CP-SAT model, solve it, read the answer. OR-Tools is known in the files `cpsat*` alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from chunkft_compile.planner.bounds import costs_of, roles_of
from chunkft_compile.planner.cpsat_memory import constrain_memory
from chunkft_compile.planner.cpsat_model import Model, StepVariables, add_step, begin, order_steps, total, train_every_chunk
from chunkft_compile.planner.cpsat_time import constant_us, rounding_us, sweep_us
from chunkft_compile.planner.drafts import Draft, Prefer
from chunkft_compile.planner.grounds import Ground, settle, spread
from chunkft_compile.planner.limits import beats
from chunkft_compile.planner.options import choose_options, make_step
from chunkft_compile.planner.problem import Placement, Problem, Step, Update

GAP = 0.002  # seconds spent below this gap are worth more than what they can still find
# CP-SAT's deterministic seconds per second of the limit. On two busy cores one of them took 5 to 20 real seconds.
DETERMINISTIC_RATE = 0.08
WALL_FACTOR = 2.0  # so that a busy machine still ends by work done, not by the clock


def build(problem: Problem, groups: list[list[int]], *, max_steps: int, prefer: Prefer = "time") -> Model:
    """The model of at most `max_steps` steps. `groups` are chunks that differ in nothing here."""
    model = begin(problem, groups)
    for number in range(max_steps):
        constrain_memory(model, add_step(model, number))
    train_every_chunk(model)
    order_steps(model)
    us, used = sweep_us(model), total(step.reaches[-1] for step in model.steps)
    model.cp.minimize(us + step_us(model, prefer) * used)
    return model


def step_us(model: Model, prefer: Prefer) -> int:
    """What a step counts in the objective beside its time."""
    return _slowest_us(model) if prefer == "fresh" else 0


def _slowest_us(model: Model) -> int:
    """More than any two sweeps of the model can differ by: then a step less is worth every microsecond."""
    problem = model.problem
    step = sum(max(cost.forward_us + cost.backward_us for cost in problem.kinds[s.kind].costs) for s in problem.segments)
    links = sum(2 * (link.read_us(s.weight_nbytes) + link.read_us(1)) for s in problem.segments for link in problem.links)
    offloaded = max((c.offloaded_nbytes for kind in problem.kinds for c in kind.costs), default=0) * len(problem.segments)
    moved = problem.links[0].read_us(offloaded) + problem.links[0].write_us(offloaded)
    return len(model.steps) * (step + links + moved) + constant_us(model) + 1


def hint(model: Model, draft: Draft) -> None:
    """Tell the solver a plan that is known. Its decisions first; what follows from them is found by solving with those fixed."""
    decided = _decisions(model, draft)
    for variable, value in decided:
        model.cp.add_hint(variable, value)
    solver = cp_model.CpSolver()
    solver.parameters.fix_variables_to_their_hinted_value = True
    solver.parameters.num_workers = 1
    if solver.solve(model.cp) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return  # a plan to the last byte may not fit in units; its decisions are still a good start
    model.cp.clear_hints()  # type: ignore[no-untyped-call]
    for index in range(len(model.cp.proto.variables)):
        variable = model.cp.get_int_var_from_proto_index(index)
        model.cp.add_hint(variable, solver.value(variable))


def _decisions(model: Model, draft: Draft) -> list[tuple[cp_model.IntVar, int]]:
    pairs = [(literal, int(draft.weights[s] is place)) for (s, place), literal in model.away.items()]
    used = sorted(draft.steps, key=lambda step: min(model.problem.chunks[index].segment for index in step.chunks))
    for number, step in enumerate(model.steps):
        pairs += _decide_step(model, step, used[number] if number < len(used) else None)
    return pairs


def _decide_step(model: Model, step: StepVariables, plan: Step | None) -> list[tuple[cp_model.IntVar, int]]:
    chosen = set(plan.chunks) if plan else set()
    pairs = [(count, len(chosen & set(members))) for count, members in zip(step.counts, model.groups, strict=True)]
    if step.immediate is not None:
        pairs.append((step.immediate, int(plan is not None and plan.update is Update.IMMEDIATE)))
    roles = roles_of(model.problem, plan.chunks) if plan else ()
    wanted = costs_of(model.problem, plan.chunks, plan.options) if plan else []
    for (s, role), picks in step.picks.items():
        here = bool(plan) and roles[s] is role
        # the wanted option may have been left out for one that beats it everywhere
        taken = next(cost for cost, _ in picks if beats(cost, wanted[s], role)) if here else None
        pairs += [(literal, int(cost is taken)) for cost, literal in picks if isinstance(literal, cp_model.IntVar) and len(picks) > 1]
    return pairs


@dataclass(frozen=True, slots=True)
class Answer:
    """The best draft found (None: there may be none), the status by name, and the proven lower bound of the objective.

    The objective is the time of a sweep, and `step_us` for each of its steps.
    """

    draft: Draft | None
    status: str
    bound_us: int
    step_us: int
    solve_s: float


def solve(model: Model, *, time_limit_s: float, seed: int, workers: int, prefer: Prefer = "time", gap: float = GAP) -> Answer:
    """The best steps found.

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
    match code:
        case cp_model.OPTIMAL | cp_model.FEASIBLE:
            bound_us = constant_us(model) + math.ceil(solver.best_objective_bound - 1e-6) - rounding_us(model)
            return Answer(_read(model, solver), solver.status_name(code), max(0, bound_us), step_us(model, prefer), solver.wall_time)
        case cp_model.UNKNOWN:
            return Answer(None, "GREEDY", 0, 0, solver.wall_time)
        case cp_model.INFEASIBLE:
            return Answer(None, "INFEASIBLE", 0, 0, solver.wall_time)
        case cp_model.MODEL_INVALID:
            raise AssertionError(f"CP-SAT refuses the model: {model.cp.validate()}")
        case _:
            raise AssertionError(f"unknown CP-SAT status {code}")


def _read(model: Model, solver: cp_model.CpSolver) -> Draft:
    weights = [Placement.DEVICE] * len(model.problem.segments)
    for (s, place), literal in model.away.items():
        if solver.value(literal):
            weights[s] = place
    ground = settle(model.problem, spread(model.problem, tuple(weights)))
    kept = solver.value(model.kept) * model.unit_nbytes
    left = [list(members) for members in model.groups]
    steps = []
    for step in model.steps:
        chunks = sorted(left[g].pop(0) for g, count in enumerate(step.counts) for _ in range(solver.value(count)))
        if chunks:
            steps.append(_read_step(ground, solver, step, chunks, model.problem.budget_nbytes - kept))
    return Draft(tuple(steps), tuple(weights))


def _read_step(ground: Ground, solver: cp_model.CpSolver, step: StepVariables, chunks: Sequence[int], budget_nbytes: int) -> Step:
    """The solver's options, or better ones: when it was stopped early they need not be the best for its chunks."""
    roles = roles_of(ground.problem, chunks)
    names = [next(cost.option for cost, literal in step.picks[s, role] if solver.value(literal)) for s, role in enumerate(roles)]
    update = ground.problem.updates[0]
    if step.immediate is not None:
        update = Update.IMMEDIATE if solver.value(step.immediate) else Update.HELD
    found = make_step(ground, chunks, names, update)
    options = choose_options(ground, chunks, budget_nbytes, update)
    return min(found, make_step(ground, chunks, options, update), key=lambda step: step.us) if options else found
