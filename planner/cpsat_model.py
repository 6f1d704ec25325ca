"""The variables of the CP-SAT model and how they hang together; `cpsat_memory` and `cpsat_time` add bytes and microseconds.

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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ortools.sat.python import cp_model

from chunkft_compile.planner.bounds import emits
from chunkft_compile.planner.grounds import Ground, away_links, on_device, settle, slab_nbytes, spread
from chunkft_compile.planner.limits import Capacity, undominated
from chunkft_compile.planner.problem import Chunk, Cost, Link, Placement, Problem, Role, Update

# CP-SAT's presolve and cuts work best with coefficients far from int64's edge: bytes are counted in units that leave the budget
# below this. Costs are rounded up and the budget down, so a plan in units is a plan in bytes.
LARGEST_BUDGET_UNITS = 1 << 26

ANYWHERE = -1  # stands for all segments where state is not counted apart
NOTHING = cp_model.LinearExpr.sum([])
Expression = cp_model.LinearExpr


@dataclass(frozen=True, slots=True)
class StepVariables:
    """One step. `counts[g]` chunks of group `g`; `picks[s, role]` pairs each option with its literal (or 0/1 expression).

    `immediate` is None where the problem leaves no choice of updates. `updating[g]` says that the backward of its segment updates
    chunks of group `g`; `returns[s, place]` that backward fetches weights from there once more.
    """

    reaches: list[cp_model.IntVar]
    counts: list[cp_model.IntVar]
    picks: dict[tuple[int, Role], list[tuple[Cost, Expression]]]
    active: list[cp_model.IntVar]
    saved: list[cp_model.IntVar]
    gradients: list[cp_model.IntVar]
    update_levels: list[cp_model.IntVar]
    immediate: cp_model.IntVar | None
    updating: dict[int, cp_model.IntVar]
    returns: dict[tuple[int, Placement], cp_model.IntVar]


@dataclass(frozen=True, slots=True)
class Model:
    """The model and what is needed to read its answer.

    `ground` has all weights on the device and all state away that may be; `away[s, place]` says that the weights of segment `s` live
    at `place`, and `slab` is what they are fetched into. `stays[t, s]` is how much state of the chunks that step `t` trains in
    segment `s` is always on the device, `kept` all of it: amounts, so that which chunks' it is can be settled later.
    """

    cp: cp_model.CpModel
    problem: Problem
    groups: list[list[int]]
    unit_nbytes: int
    ground: Ground
    capacity: Capacity
    slab: cp_model.IntVar
    kept: cp_model.IntVar
    away: dict[tuple[int, Placement], cp_model.IntVar] = field(default_factory=dict)
    stays: dict[tuple[int, int], cp_model.IntVar] = field(default_factory=dict)
    steps: list[StepVariables] = field(default_factory=list)

    def chunk(self, group: int) -> Chunk:
        """Any chunk of a group: they are equal."""
        return self.problem.chunks[self.groups[group][0]]

    def update_units(self, group: int) -> int:
        """What the update of a chunk takes with its state away."""
        return self.units(self.ground.update_nbytes[self.groups[group][0]])

    def units(self, nbytes: int) -> int:
        """Bytes in units, rounded up."""
        return -(-nbytes // self.unit_nbytes)

    @property
    def most_room(self) -> int:
        """What the budget leaves above the static bytes at most, in units, rounded down."""
        return max(0, self.capacity.room // self.unit_nbytes)

    @property
    def room(self) -> Expression:
        """What it leaves with the weights and the state where the model puts them."""
        least = (self.problem.budget_nbytes - self.ground.base_nbytes) // self.unit_nbytes
        gained = total(self.problem.segments[s].weight_nbytes // self.unit_nbytes * literal for (s, _), literal in self.away.items())
        return least + gained - self.kept - (self.slab if self.away else NOTHING)

    @property
    def levels(self) -> list[int]:
        """The distinct sizes of an update, ascending, in units."""
        return sorted({self.update_units(g) for g in range(len(self.groups))})

    @property
    def links(self) -> list[Link]:
        """The links over which weights may be streamed."""
        return away_links(self.problem)


def begin(problem: Problem, groups: list[list[int]]) -> Model:
    """The model with what all steps have in common: where weights and state live."""
    unit = 1
    while problem.budget_nbytes // unit > LARGEST_BUDGET_UNITS:
        unit *= 2
    cp = cp_model.CpModel()
    largest = max((slab_nbytes(s.weight_nbytes, link) for s in problem.segments for link in away_links(problem)), default=0)
    ground = settle(problem, spread(problem, on_device(problem)))
    capacity = Capacity(problem)
    slab = cp.new_int_var(0, -(-largest // unit), "slab")
    kept = cp.new_int_var(0, max(0, capacity.room // unit), "kept")
    model = Model(cp, problem, groups, unit, ground, capacity, slab, kept)
    _place_weights(model)
    return model


def _place_weights(model: Model) -> None:
    cp = model.cp
    for s, segment in enumerate(model.problem.segments):
        if not segment.weight_nbytes or not model.links:
            continue
        for link in model.links:
            model.away[s, link.placement] = cp.new_bool_var(f"away_{s}_{link.placement}")
            cp.add(model.slab >= model.units(slab_nbytes(segment.weight_nbytes, link)) * model.away[s, link.placement])
        anywhere = total(model.away[s, link.placement] for link in model.links)
        cp.add(anywhere <= 1 if Placement.DEVICE in model.problem.weights else anywhere == 1)
    for link in model.links:
        if link.capacity_nbytes is not None:
            state = sum(
                chunk.state_nbytes
                for chunk, place in zip(model.problem.chunks, model.ground.places.state, strict=True)
                if place is link.placement
            )
            there = [model.units(model.problem.segments[s].weight_nbytes) * v for (s, p), v in model.away.items() if p is link.placement]
            cp.add(total(there) <= max(0, link.capacity_nbytes - state) // model.unit_nbytes)


def add_step(model: Model, number: int) -> StepVariables:
    """A further step with its roles."""
    cp, room, updates = model.cp, model.most_room, model.problem.updates
    segments = range(len(model.problem.segments))
    counts = []
    for g, members in enumerate(model.groups):
        window = model.update_units(g) if model.capacity.held_only else 0
        most = (room - window) // model.units(model.chunk(g).grad_nbytes)
        counts.append(cp.new_int_var(0, max(0, min(len(members), most)), f"count_{number}_{g}"))
    step = StepVariables(
        reaches=[cp.new_bool_var(f"reaches_{number}_{s}") for s in segments],
        counts=counts,
        picks={},
        active=[cp.new_bool_var(f"active_{number}_{s}") for s in segments],
        saved=[cp.new_int_var(0, room, f"saved_{number}_{s}") for s in segments],
        gradients=[cp.new_int_var(0, room, f"gradients_{number}_{s}") for s in segments],
        update_levels=[cp.new_bool_var(f"update_{number}_{i}") for i in range(len(model.levels))] if Update.HELD in updates else [],
        immediate=cp.new_bool_var(f"immediate_{number}") if len(set(updates)) > 1 else None,
        updating={g: cp.new_bool_var(f"updating_{number}_{g}") for g in range(len(model.groups))} if Update.IMMEDIATE in updates else {},
        returns={place: cp.new_bool_var(f"returns_{number}_{place[0]}_{place[1]}") for place in model.away},
    )
    for s in segments:
        for role, happens in _roles(step, s).items():
            step.picks[s, role] = _pick(model, happens, undominated(model.problem.costs(s, role), role), f"{number}_{s}_{role}")
    for (s, place), literal in step.returns.items():
        cp.add(literal >= model.away[s, place] + step.reaches[s] - 1)
    _constrain_roles(model, step)
    _place_state(model, step, number)
    model.steps.append(step)
    return step


def _place_state(model: Model, step: StepVariables, number: int) -> None:
    """State that may stay, of chunks whose state is otherwise moved."""
    if Placement.DEVICE not in model.problem.state:
        return
    for s in state_segments(model):
        moving = [g for g, members in enumerate(model.groups) if s in (model.chunk(g).segment, ANYWHERE) and _moves(model, members)]
        sizes = {g: model.units(model.chunk(g).state_nbytes) for g in moving}
        most = min(model.most_room, sum(largest(step.counts[g]) * sizes[g] for g in moving))
        if most:
            model.stays[number, s] = model.cp.new_int_var(0, most, f"stays_{number}_{s}")
            model.cp.add(model.stays[number, s] <= total(sizes[g] * step.counts[g] for g in moving))


def state_segments(model: Model) -> list[int]:
    """Segments whose state is counted apart: only where IMMEDIATE updates hide transfers behind the backward of each."""
    if Update.IMMEDIATE in model.problem.updates and any(link.overlaps for link in model.problem.links):
        return sorted({chunk.segment for chunk in model.problem.chunks})
    return [ANYWHERE]


def _moves(model: Model, members: list[int]) -> bool:
    move = model.ground.state_moves[members[0]]
    return move.hidden_us + move.exposed_us > 0


def _roles(step: StepVariables, s: int) -> dict[Role, Expression]:
    """0/1 expressions: which role segment `s` has (none in an unused step)."""
    used, here, under = step.reaches[-1], step.reaches[s], below(step.reaches, s)
    return {Role.FROZEN: used - here, Role.LAST: here - under, Role.ACTIVE: step.active[s], Role.PASS: under - step.active[s]}


def _pick(model: Model, happens: Expression, costs: list[Cost], name: str) -> list[tuple[Cost, Expression]]:
    """One literal per option, of which exactly one is true if the role happens. A single option needs none."""
    if len(costs) == 1:
        return [(costs[0], happens)]
    literals = [model.cp.new_bool_var(f"pick_{name}_{cost.option}") for cost in costs]
    model.cp.add(total(literals) == happens)
    return list(zip(costs, literals, strict=True))


def _constrain_roles(model: Model, step: StepVariables) -> None:
    """Roles follow from the chunks, in both directions: no segment may call itself ACTIVE because that is cheaper."""
    cp = model.cp
    for s, reaches in enumerate(step.reaches):
        under = below(step.reaches, s)
        cp.add(under <= reaches)
        cp.add(step.active[s] <= under)
        emitting = [g for g in range(len(model.groups)) if emits(model.chunk(g), s)]
        lowest = [step.counts[g] for g in emitting if model.chunk(g).segment == s]
        cp.add(step.active[s] <= total(step.counts[g] for g in emitting))
        cp.add(reaches - under <= total(lowest))
        for g in emitting:
            most = largest(step.counts[g])
            cp.add(step.counts[g] <= most * (reaches - under + step.active[s]))
            if model.chunk(g).segment < s:  # the LAST above must not stand in for the lower half of a tied weight
                cp.add(step.counts[g] <= most * step.reaches[model.chunk(g).segment])


def train_every_chunk(model: Model) -> None:
    """Every chunk in exactly one step, and what stays of their state counted together."""
    model.cp.add(model.kept == total(model.stays.values()))
    for g, members in enumerate(model.groups):
        model.cp.add(total(step.counts[g] for step in model.steps) == len(members))


def order_steps(model: Model) -> None:
    """See NOTE [steps that must be deep]."""
    for step, later in zip(model.steps, model.steps[1:], strict=False):
        for s in range(len(step.reaches)):
            model.cp.add(later.reaches[s] <= step.reaches[s])
    trained = min(chunk.segment for chunk in model.problem.chunks)
    for s in range(trained, len(model.problem.segments)):
        needed = model.capacity.fewest_steps(s)
        model.cp.add(total(step.reaches[s] for step in model.steps) >= needed)
        for step in model.steps[:needed]:
            model.cp.add(step.reaches[s] == 1)
    if model.capacity.held_only:
        _order_updates(model)


def _order_updates(model: Model) -> None:
    top = len(model.problem.segments) - 1
    for i, level in enumerate(model.levels):
        least = model.capacity.fewest_steps(top, (level - 1) * model.unit_nbytes + 1)
        model.cp.add(total(step.update_levels[i] for step in model.steps) >= least)


def below(variables: Sequence[cp_model.IntVar], s: int) -> Expression:
    """The variable of the segment under `s`, or nothing."""
    return variables[s - 1] if s else NOTHING


def total(terms: Iterable[Expression]) -> Expression:
    """`sum` without its integer zero, so that the type is always an expression."""
    return cp_model.LinearExpr.sum(list(terms))


def largest(variable: cp_model.IntVar) -> int:
    """The upper end of a domain."""
    return int(list(variable.proto.domain)[-1])  # the wrapper does not support negative indices
