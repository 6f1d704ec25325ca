"""Plans for the tests of reports: of a decoder that was never lowered, of random problems, and of a tiny model that was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import chunkft_compile
from chunkft_compile.planner import Chunk, Fingerprint, Plan, Problem, sketch, smallest_budget
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.options import best_step
from chunkft_compile.solving import read_plan
from tests.models import llama, token_batch
from tests.planner.planner_problems import greedy_schedule, problems, transformer

MADE_FOR = Fingerprint("abc", (), ("['input_ids'] int64 [1, 8]",), "bfloat16", "rtx4090", "adamw", False, "2.13.0", "plain")


def named(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """With names as those of real plans: `weight[3]` becomes `weight[6:8]`."""
    found = []
    for chunk in chunks:
        parameter, _, piece = chunk.name.removesuffix("]").partition("[")
        start = 2 * int(piece or 0)
        found.append(replace(chunk, name=f"{parameter}[{start}:{start + 2}]"))
    return tuple(found)


def plan_of(problem: Problem, **made_for: Any) -> Plan:
    """A sketch of a problem as a plan for a device that was not there."""
    schedule = sketch(problem)
    assert schedule is not None
    made_for.setdefault("chunks", tuple(chunk.name for chunk in problem.chunks))
    return Plan(replace(MADE_FOR, **made_for), problem, schedule)


def decoder(times: float, layers: int = 4, parts: int = 1, **changes: Any) -> Plan:
    """A decoder in so many times the smallest budget."""
    problem = transformer(layers, 0.5, tokens=256, parts=parts)
    problem = replace(problem, chunks=named(problem.chunks), **changes)
    return plan_of(replace(problem, budget_nbytes=int(times * smallest_budget(problem)[0])))


def one_chunk_a_step(planned: Plan) -> Plan:
    """As many steps as there are chunks."""
    problem, places = planned.problem, planned.schedule.places
    ground = settle(problem, places)
    steps = [best_step(ground, [index], problem.budget_nbytes) for index in range(len(problem.chunks))]
    return replace(planned, schedule=replace(planned.schedule, steps=tuple(step for step in steps if step is not None)))


@st.composite
def random_plans(draw: st.DrawFn) -> Plan | None:
    """Plans of small random problems, with all that moves; None where nothing fits."""
    problem = draw(problems(modes=True, places=True))
    schedule = greedy_schedule(problem)
    return None if schedule is None else Plan(replace(MADE_FOR, chunks=tuple(chunk.name for chunk in problem.chunks)), problem, schedule)


def lowered_plan(directory: Path, budget_nbytes: int, **settings: Any) -> Plan:
    """The kept plan of a model of two blocks on this machine."""
    torch.manual_seed(0)
    model = chunkft_compile.compile(llama().train(), budget=budget_nbytes, solve_seconds=1.0, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.plan(**token_batch())
    del optimizer
    model.save_schedule(directory / "plan.json")
    return read_plan(directory / "plan.json")
