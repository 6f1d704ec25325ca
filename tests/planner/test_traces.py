"""Traces of bounds: they add up to the notes of `problem`. Those of programs are checked wherever a plan is kept (`trace_program`)."""

from hypothesis import given

from chunkft_compile.planner.bounds import loads
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.problem import Placement, Problem, Update
from chunkft_compile.planner.program import Op
from chunkft_compile.planner.times import step_us
from chunkft_compile.planner.traces import Category, trace_bound
from tests.planner.planner_problems import greedy_schedule, problems


@given(problems(modes=True, places=True))
def test_a_trace_adds_up_to_the_bound(problem: Problem) -> None:
    schedule = greedy_schedule(problem)
    if schedule is None:
        return
    ground = settle(problem, schedule.places)
    for step in schedule.steps:
        trace = trace_bound(problem, step, schedule.places)
        moments = loads(ground, step.chunks, step.options, step.update)
        assert [(instant.name, instant.peak_nbytes) for instant in trace.instants] == [(load.name, load.nbytes) for load in moments]
        assert trace.peak_nbytes == step.peak_nbytes
        assert sum(instant.us for instant in trace.instants) == step.us == step_us(ground, step.chunks, step.options, step.update)
        stacks = trace.stacks()
        for number, load in enumerate(moments):
            assert sum(stack[number] for stack in stacks.values()) == load.nbytes
            assert sum(lifetime.nbytes for lifetime in trace.live_at(number)) == load.nbytes
            own = sum(stacks[category][number] for category in (Category.WEIGHTS, Category.STAGING))
            resident = sum(problem.chunks[index].state_nbytes for index in schedule.places.resident)
            assert own + resident == load.static_nbytes
            if step.update is Update.HELD or trace.instants[number].op is not Op.UPDATE:
                assert stacks[Category.GRADIENTS][number] == load.grad_nbytes
        assert min(min(stack) for stack in stacks.values()) >= 0
        split = trace.time_split()
        assert min(split.values()) >= 0
        assert sum(us for name, us in split.items() if name != "hidden transfers") == step.us


@given(problems(places=True))
def test_hidden_and_exposed_transfers_are_all_transfers(problem: Problem) -> None:
    schedule = greedy_schedule(problem)
    if schedule is None:
        return
    everything_here = {*schedule.places.state, *schedule.places.weights} == {Placement.DEVICE}
    for step in schedule.steps:
        trace = trace_bound(problem, step, schedule.places)
        split = trace.time_split()
        assert split["exposed transfers"] + split["hidden transfers"] == trace.moving_us
        if everything_here and all(not cost.offloaded_nbytes for kind in problem.kinds for cost in kind.costs):
            assert trace.moving_us == 0
