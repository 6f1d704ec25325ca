"""From a captured signature to a schedule: solved here, or one that was kept; and why a budget is refused."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from chunkft_compile.compiled import Compiled
from chunkft_compile.errors import BudgetError
from chunkft_compile.largest import largest_tensors
from chunkft_compile.planner import (
    Fingerprint,
    Placement,
    Plan,
    PlanMismatch,
    Prefer,
    Problem,
    Schedule,
    check_fingerprint,
    from_json,
    plans,
    restrict,
    sketch,
    to_json,
    verify,
)
from chunkft_compile.planner.drafts import rank
from chunkft_compile.planner.explaining import budget_error, hardest_step
from chunkft_compile.planner.grounds import leanest
from chunkft_compile.planner.proving import least_pass_us
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.writing import write_whole

_LOWERED = 3
_CLOSE = 1.1  # the times of the planner and of lowered programs differ by a few per cent
_FASTER = 0.9  # another form must be so much faster by its sketch to be searched as well
# A search is begun where the gap, times the seconds it may take, is worth it: from 5 % on for the default of 5 seconds. Of plans that
# were closer, such a search made none better by 0.1 % (a dozen problems); it takes a second or
# three, the more the deeper a model is.
_WORTHWHILE = 0.25


@dataclass(frozen=True)
class Solving:
    """How to solve: seconds of work, seed, what to prefer, the most steps of a sweep (None: no limit).

    `options`, `state` and `weights` force ingredients, as in `planner.restrict`; None leaves all of them, and weights on the device unless
    a sweep with some of them away is a tenth faster.
    """

    seconds: float = 5.0
    seed: int = 0
    prefer: Prefer = "time"
    max_steps: int | None = None
    options: tuple[str, ...] | None = None
    state: tuple[Placement, ...] | None = None
    weights: tuple[Placement, ...] | None = None

    @property
    def forced(self) -> bool:
        """Whether ingredients are forced, which may need a larger budget than planning freely."""
        return self.options is not None or self.state is not None


def forms(compiled: Compiled, solving: Solving, *, accumulating: bool) -> list[Problem]:
    """The planner's question in the order of preference: each one fits budgets that the one before does not.

    With weights on the device they never move; and with bytes kept free for copies beside calls copies take no time.
    """
    away = tuple(link.placement for link in compiled.setting.links)
    where = [solving.weights] if solving.weights is not None else [(Placement.DEVICE,), (Placement.DEVICE, *away)]
    beside = [True, False] if any(link.overlaps for link in compiled.setting.links) else [False]
    return [
        restrict(
            compiled.problem(accumulating=accumulating, weights=weights, overlaps=overlaps), options=solving.options, state=solving.state
        )
        for weights in where
        for overlaps in beside
    ]


def solve(compiled: Compiled, solving: Solving, *, accumulating: bool) -> tuple[Problem, Schedule]:
    """The schedule for this signature, with exact peaks and times, and the question it answers. Raises `BudgetError`.

    The first form that fits is searched. A later one, which moves more bytes, is searched as well where a sketch of it is a tenth
    faster: just above the smallest budget of a form there are many steps to a sweep, or much is computed again.
    """
    questions = forms(compiled, solving, accumulating=accumulating)
    best: _Answer | None = None
    for problem in questions:
        if best is not None and not _promises(problem, best.planned, solving):
            continue
        try:
            found = _solve(compiled, problem, solving)
        except BudgetError:
            if best is None and problem is questions[-1]:
                raise
            continue
        best = found if best is None else min(best, found, key=lambda one: rank(one.schedule.steps, solving.prefer))
    assert best is not None, "the last form fits or raises"
    return best.problem, best.schedule


class _Answer(NamedTuple):
    """A question, the best schedule by the times of the planner, and the best one with those of its programs."""

    problem: Problem
    planned: Schedule
    schedule: Schedule


def _promises(problem: Problem, schedule: Schedule, solving: Solving) -> bool:
    """Whether the best that needs no search is a tenth better than what a search found for another form; both by the planner's times."""
    if solving.prefer == "time" and least_pass_us(problem) > _FASTER * schedule.sweep_us:
        return False
    quick = sketch(problem, prefer=solving.prefer)
    if quick is None or len(quick.steps) > (solving.max_steps or len(quick.steps)):
        return False
    if solving.prefer == "fresh" and len(quick.steps) != len(schedule.steps):
        return len(quick.steps) < len(schedule.steps)
    return quick.sweep_us <= _FASTER * schedule.sweep_us


def _solve(compiled: Compiled, problem: Problem, solving: Solving) -> _Answer:
    """The planner's best few are lowered: its times are bounds, and among plans that are close another may be the fastest."""
    found = plans(
        problem,
        prefer=solving.prefer,
        max_steps=solving.max_steps,
        time_limit_s=solving.seconds,
        seed=solving.seed,
        gap=_WORTHWHILE / max(_WORTHWHILE, solving.seconds),
        most=_LOWERED,
    )
    close = [schedule for schedule in found if schedule.sweep_us <= _CLOSE * found[0].sweep_us]
    exact = [compiled.exact(schedule, accumulating=problem.accumulating) for schedule in close]
    schedule = min(exact, key=lambda schedule: (len(schedule.steps) if solving.prefer == "fresh" else 0, schedule.sweep_us))
    budget = problem.budget_nbytes
    assert schedule.peak_nbytes <= budget, f"the plan's exact peak of {schedule.peak_nbytes} bytes is over the budget of {budget}"
    return _Answer(problem, found[0], schedule)


def explained_error(compiled: Compiled, problem: Problem, model: nn.Module) -> BudgetError:
    """The refusal of a budget, with the largest tensors at the instruction that binds it."""
    step, error = hardest_step(problem), budget_error(problem)
    assembled = compiled.program(step, leanest(problem).places, accumulating=problem.accumulating)
    names = [f"{made.op} {compiled.segments[made.segment].name}" for made in assembled.program.instructions]
    at = names.index(error.binding) if error.binding in names else None
    largest = largest_tensors(assembled, model, compiled.temporary_nbytes, at)
    return BudgetError(
        "\n".join([str(error), "the largest tensors then:", *(f"  {format_nbytes(nbytes):>12}  {name}" for name, nbytes in largest)]),
        smallest_nbytes=error.smallest_nbytes,
        binding=error.binding,
    )


def fingerprint(compiled: Compiled, *, accumulating: bool) -> Fingerprint:
    """What a schedule for this signature depends on."""
    setting = compiled.setting
    return Fingerprint(
        graph=graph_hash((segment.name, segment.kind) for segment in compiled.segments),
        chunks=tuple(chunk.name for chunk in setting.chunks),
        inputs=compiled.inputs,
        dtype=dtypes_of(chunk.weight for chunk in setting.chunks),
        device=setting.device,
        optimizer=setting.optimizer.name,
        accumulating=accumulating,
        torch=str(torch.__version__),
        precision=str(setting.precision),
    )


def graph_hash(segments: Iterable[tuple[str, str]]) -> str:
    """The hash of a model's graph: the name and the kind of every segment."""
    return hashlib.sha256(repr(list(segments)).encode()).hexdigest()[:16]


def dtypes_of(tensors: Iterable[torch.Tensor]) -> str:
    """The dtypes there are, by name."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def describe_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Every leaf of a batch: where it is passed, and its dtype and shape, or its value."""
    leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    texts = []
    for path, leaf in leaves:
        where = pytree.keystr(path[1:])
        value = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        texts.append(f"{where} {value}")
    return tuple(texts)


def standing_plan(compiled: Compiled, problem: Problem, schedule: Schedule) -> Plan:
    """The schedule of this signature as a run stands under it, for a checkpoint: with the peaks and times it was planned with, untraced."""
    return Plan(fingerprint(compiled, accumulating=problem.accumulating), problem, schedule)


def kept(compiled: Compiled, problem: Problem, schedule: Schedule) -> Plan:
    """The schedule of this signature to keep, and the question it answers.

    A schedule that goes on for a larger batch, or for gradients that accumulate, was planned with other peaks and times.
    """
    schedule = compiled.exact(schedule, accumulating=problem.accumulating)
    traces = tuple(compiled.trace(problem, step, schedule.places) for step in schedule.steps)
    return replace(standing_plan(compiled, problem, schedule), traces=traces)


def given(compiled: Compiled, planned: Plan, *, accumulating: bool) -> Schedule:
    """The schedule of a kept plan, to be run exactly; peaks and times are those of the programs lowered here.

    Raises `PlanMismatch` where it was made for something else, or asks for what this runtime does not do.
    """
    check_fingerprint(planned.fingerprint, fingerprint(compiled, accumulating=accumulating))
    places = planned.schedule.places
    here = {Placement.DEVICE, *(link.placement for link in compiled.setting.links)}
    if strange_places := {*places.state, *places.weights} - here:
        raise PlanMismatch(f"this plan keeps something on the {min(strange_places)}, which this device does not use; plan again")
    problem = compiled.problem(accumulating=accumulating)
    names = {cost.option for kind in problem.kinds for cost in kind.costs}
    strange = {option for step in planned.schedule.steps for option in step.options} - names
    if strange:
        raise PlanMismatch(f"this plan has options that no segment has here: {', '.join(sorted(strange))}; plan again")
    # options that no other beats are found by measured times: another machine may have dropped some, so they are not verified by name
    schedule = compiled.exact(planned.schedule, accumulating=accumulating)
    if schedule.peak_nbytes > problem.budget_nbytes:
        raise PlanMismatch(
            f"this plan needs {schedule.peak_nbytes} bytes here, its budget is {problem.budget_nbytes}; plan again with this version"
        )
    return schedule


def write_plan(planned: Plan, path: str | Path) -> None:
    """Write a plan as JSON, in one move. Raises `OSError` where that is impossible."""
    write_whole(path, to_json(planned))


def read_plan(source: str | Path | Plan) -> Plan:
    """A kept plan. Raises `ValueError` for a file that cannot be read or holds something else."""
    if isinstance(source, Plan):
        return source
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the plan {source} cannot be read: {error}") from error
    try:
        found = from_json(text, Plan)
        verify(found.problem, found.schedule, lowered=found.lowered)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source} is not a plan: {error}") from error
    return found
