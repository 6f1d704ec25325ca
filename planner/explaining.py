"""Why a budget is too small, what would be enough, and what would help."""

from collections.abc import Sequence
from dataclasses import replace

from chunkft_compile.planner.bounds import Load, loads
from chunkft_compile.planner.grounds import Ground, leanest
from chunkft_compile.planner.options import best_step, each_fits, fits, smallest_for, sorts
from chunkft_compile.planner.problem import BudgetError, Placement, Problem, Step, StepsError, Update
from chunkft_compile.planner.units import format_nbytes


def smallest_budget(problem: Problem) -> tuple[int, str]:
    """The smallest budget that has a schedule, in bytes, and the instruction that binds it. Exact.

    The planner finds a schedule as soon as every chunk fits in a step of its own, and refuses otherwise, so it is the largest of
    what these steps need. (More chunks would need less only where a segment takes more memory to do less, say to be FROZEN.)
    """
    ground = leanest(problem)
    index, nbytes = _hardest_chunk(ground)
    return nbytes, _binding_load(ground, index, nbytes).name


def fits_at_all(problem: Problem) -> bool:
    """Is there a schedule? See `smallest_budget`."""
    return each_fits(leanest(problem), problem.budget_nbytes)


def hardest_step(problem: Problem) -> Step:
    """The step that needs the smallest budget: the hardest chunk alone."""
    ground = leanest(problem)
    index, nbytes = _hardest_chunk(ground)
    step = best_step(ground, [index], nbytes)
    assert step is not None, f"chunk {index} fits {nbytes} bytes"
    return step


def budget_error(problem: Problem, *, streaming: bool = True) -> BudgetError:
    """The error for a problem without a schedule: what binds, how much would do, what would help.

    `streaming` says that weights could live beside the device, if the caller allowed it.
    """
    ground = leanest(problem)
    index, nbytes = _hardest_chunk(ground)
    load = _binding_load(ground, index, nbytes)
    lines = [
        f"no schedule fits the budget of {format_nbytes(problem.budget_nbytes)} ({problem.budget_nbytes} bytes)",
        f"the smallest that does is {format_nbytes(nbytes, up=True)} ({nbytes} bytes): {load.name} needs it, even when only "
        f"{problem.chunks[index].name} is trained",
        *(f"  {format_nbytes(size):>12}  {what}" for what, size in contributions(load)),
        f'give a budget of "{format_nbytes(nbytes, up=True).replace(" ", "")}" or more, or a smaller batch or sequence',
        *(f"or {advice}" for advice in remedies(problem, streaming=streaming)),
    ]
    return BudgetError("\n".join(lines), smallest_nbytes=nbytes, binding=load.name)


def steps_error(problem: Problem, max_steps: int, *, proven: bool) -> StepsError:
    """The error where a budget has schedules, but none with so few steps."""
    found = "none exists" if proven else "none was found in the time given"
    nbytes = smallest_budget(problem)[0]
    return StepsError(
        f"no schedule of at most {max_steps} steps fits {format_nbytes(problem.budget_nbytes)} ({problem.budget_nbytes} bytes): {found}; "
        f"give more bytes or more steps (without a limit on steps {format_nbytes(nbytes, up=True)} is enough)",
        smallest_nbytes=nbytes,
        binding=f"at most {max_steps} steps",
    )


def remedies(problem: Problem, *, streaming: bool) -> list[str]:
    """What the caller has not allowed, and the smallest budget with it."""
    now = smallest_budget(problem)[0]
    with_it = [(what, smallest_budget(other)[0]) for what, other in alternatives(problem, streaming=streaming).items()]
    return [f"{what}: {format_nbytes(nbytes, up=True)} is enough" for what, nbytes in with_it if nbytes < now]


def alternatives(problem: Problem, *, streaming: bool) -> dict[str, Problem]:
    """What the caller has not allowed by name, and the problem with it. `streaming` says that weights could live beside the device."""
    found = {}
    away = tuple(link.placement for link in problem.links)
    if streaming and problem.weights == (Placement.DEVICE,) and any(segment.weight_nbytes for segment in problem.segments):
        found["weights beside the device"] = replace(problem, weights=(Placement.DEVICE, *away))
    if problem.updates == (Update.HELD,) and not problem.accumulating:
        found["IMMEDIATE updates"] = replace(problem, updates=(Update.HELD, Update.IMMEDIATE))
    if problem.accumulating:
        found["no accumulation"] = replace(problem, accumulating=False)
    if problem.state == (Placement.DEVICE,):
        found["optimizer state beside the device"] = replace(problem, state=(Placement.DEVICE, *away))
    return found


def _hardest_chunk(ground: Ground) -> tuple[int, int]:
    """The chunk whose own step needs the largest budget, and that budget."""
    hardest, nbytes = -1, 0
    for index in sorts(ground):
        if hardest < 0 or not fits(ground, [index], nbytes):  # most chunks fit what an earlier one needs: one cheap test
            hardest, nbytes = index, smallest_for(ground, [index], nbytes)
    return hardest, nbytes


def _binding_load(ground: Ground, index: int, nbytes: int) -> Load:
    """The fullest moment of the chunk's own step; at the smallest budget it fills it to the last byte."""
    step = best_step(ground, [index], nbytes)
    assert step is not None, f"chunk {index} fits {nbytes} bytes"
    return binding_load(ground, step)


def binding_load(ground: Ground, step: Step) -> Load:
    """The fullest moment of a step."""
    return max(loads(ground, step.chunks, step.options, step.update), key=lambda load: load.nbytes)


def contributions(load: Load) -> Sequence[tuple[str, int]]:
    """What is live at a moment, the largest first."""
    own = "optimizer state and workspace" if load.name.startswith("update") else "entering values and workspace"
    parts = [
        ("weights, buffers and inputs", load.static_nbytes),
        ("saved values", load.saved_nbytes),
        ("gradient slices", load.grad_nbytes),
        (own, load.own_nbytes),
    ]
    return sorted(((what, size) for what, size in parts if size), key=lambda part: -part[1])
