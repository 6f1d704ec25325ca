"""Schedules that the solver did not choose, and a model that runs them."""

from dataclasses import replace

from chunkft_compile import ChunkedModule
from chunkft_compile.planner import Problem, Schedule, Step, method_problem, verify
from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import on_device, settle, spread
from chunkft_compile.planner.methods import method_steps
from chunkft_compile.runtime.sweep import Sweep


def greedy(problem: Problem) -> Schedule | None:
    """The plan without a solver, all weights on the device; None where it finds none."""
    return _schedule(problem, greedy_steps(settle(problem, spread(problem, on_device(problem)))))


def by_method(problem: Problem, name: str) -> Schedule | None:
    """The sweep of one of `planner.methods.METHODS`, each step with its fastest options; None where none fits."""
    method = method_problem(problem, name)
    return _schedule(problem, method_steps(settle(method, spread(method, on_device(method))), name)) if method else None


def adopt(model: ChunkedModule, schedule: Schedule) -> Schedule:
    """Let a model that has planned, but not trained, follow `schedule`; gives it with exact peaks and times.

    The schedule must be over the chunks of the same model in the same budget. Raises `ValueError` if a step needs more than the budget.
    """
    session = model._session
    assert session.latest is not None, "plan first"
    exact = session.latest.exact(schedule, accumulating=False)
    if exact.peak_nbytes > model.budget_nbytes:
        raise ValueError(f"the schedule needs {exact.peak_nbytes} bytes, the budget is {model.budget_nbytes}")
    session.sweep = Sweep(exact)
    session.keeper.place(session.latest.weight_places(exact.places))
    return exact


def same(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules train the same chunks with the same options in the same steps, in whatever order."""
    return {_plain(step) for step in one.steps} == {_plain(step) for step in other.steps} and one.places == other.places


def _plain(step: Step) -> Step:
    return replace(step, peak_nbytes=0, us=0)


def _schedule(problem: Problem, steps: tuple[Step, ...] | None) -> Schedule | None:
    """With optimizer state placed as the planner places it, and checked as the planner's own."""
    if steps is None:
        return None
    finished, places = finish(problem, Draft(steps, on_device(problem)))
    schedule = Schedule(problem.budget_nbytes, finished, places, "GREEDY", 1.0, 0.0)
    verify(problem, schedule)
    return schedule
