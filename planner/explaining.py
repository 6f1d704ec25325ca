"""Why a budget is too small, and what would be enough."""

from collections.abc import Iterator
from dataclasses import replace

from chunkft_compile.planner.bounds import Load, choose_options, fits, loads
from chunkft_compile.planner.problem import BudgetError, Chunk, Problem
from chunkft_compile.planner.units import format_nbytes


def smallest_budget(problem: Problem) -> tuple[int, str]:
    """The smallest budget that has a schedule, in bytes, and the instruction that binds it. Exact.

    The planner finds a schedule as soon as every chunk fits in a step of its own, and refuses otherwise, so it is the largest of
    what these steps need. (More chunks would need less only where a segment takes more memory to do less, say to be FROZEN.)
    """
    index, nbytes = _hardest_chunk(problem)
    return nbytes, _binding_load(problem, index, nbytes).name


def budget_error(problem: Problem) -> BudgetError:
    """The error for a problem without a schedule: what binds, how much would do, what to change."""
    index, nbytes = _hardest_chunk(problem)
    load = _binding_load(problem, index, nbytes)
    lines = [
        f"no schedule fits the budget of {format_nbytes(problem.budget_nbytes)} ({problem.budget_nbytes} bytes)",
        f"the smallest that does is {format_nbytes(nbytes, up=True)} ({nbytes} bytes): {load.name} needs it, even when only "
        f"{problem.chunks[index].name} is trained",
        *(f"  {format_nbytes(size):>12}  {what}" for what, size in _contributions(load)),
        f'give a budget of "{format_nbytes(nbytes, up=True).replace(" ", "")}" or more, or a smaller batch or sequence',
    ]
    return BudgetError("\n".join(lines), smallest_nbytes=nbytes, binding=load.name)


def _hardest_chunk(problem: Problem) -> tuple[int, int]:
    """The chunk whose own step needs the largest budget, and that budget."""
    hardest, nbytes = -1, 0
    for index in _distinct(problem):
        if hardest < 0 or not fits(problem, [index], nbytes):  # most chunks fit what an earlier one needs: one cheap test
            hardest, nbytes = index, _smallest_alone(problem, index, nbytes)
    return hardest, nbytes


def _distinct(problem: Problem) -> Iterator[int]:
    """One chunk of each sort; what its name and its times are makes no difference to memory."""
    seen: set[Chunk] = set()
    for index, chunk in enumerate(problem.chunks):
        sort = replace(chunk, name="", state_nbytes=0, grad_us=0)
        if sort not in seen:
            seen.add(sort)
            yield index


def _smallest_alone(problem: Problem, index: int, too_small: int) -> int:
    """Binary search for the budget of a step with this chunk alone, above `too_small`."""
    enough = max(2 * too_small, problem.static_nbytes, 1)
    while not fits(problem, [index], enough):
        too_small, enough = enough, 2 * enough
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if fits(problem, [index], middle):
            enough = middle
        else:
            too_small = middle
    return enough


def _binding_load(problem: Problem, index: int, nbytes: int) -> Load:
    """The fullest moment of the chunk's own step; at the smallest budget it fills it to the last byte."""
    options = choose_options(problem, [index], nbytes)
    assert options is not None, f"chunk {index} fits {nbytes} bytes"
    return max(loads(problem, [index], options), key=lambda load: load.nbytes)


def _contributions(load: Load) -> list[tuple[str, int]]:
    own = "optimizer state and workspace" if load.name == "update" else "entering values and workspace"
    parts = [
        ("weights, buffers and inputs", load.static_nbytes),
        ("saved values", load.saved_nbytes),
        ("gradient slices", load.grad_nbytes),
        (own, load.own_nbytes),
    ]
    return sorted(((what, size) for what, size in parts if size), key=lambda part: -part[1])
