"""The data of a report for other programs: one JSON object, its fields all there in this version.

    version         1; raised when a field changes its meaning or goes
    type            "chunkft report"
    modelled        true: peaks are the planner's bound and times a roofline for a device that was not there; false: peaks are exact
    made_for        what the plan depends on (`Fingerprint`), without the chunks
    budget_nbytes, peak_nbytes, sweep_us, status, gap, solve_s
    segments        each with its name, and where its `weight_nbytes` live between uses (`weights`)
    chunks          each with its name, its segment (an index), `grad_nbytes`, `state_nbytes`, and where its state lives (`state`)
    steps           in order, each with
        chunks          indices of the chunks it trains
        options         the option of each segment
        depth           the lowest segment with a backward (an index)
        update          "held" or "immediate"
        us, peak_nbytes
        binding         the index of the instant at the peak
        time_us         by what it is spent on; "hidden transfers" are beside the others, which add up to `us`
        instants        one for each instruction: `op`, `name`, `us`, `waited_us`, `peak_nbytes`
        stacks          bytes of each category at every instant; they add up to the peaks
        lifetimes       `name`, `category`, `nbytes`, and the instants `first` to `last` between which the bytes are there, both included

Bytes are on the device, times are microseconds, instants, chunks and segments count from 0.
"""

import json
from dataclasses import asdict
from typing import Any

from chunkft_compile.planner import Plan, Problem, Step, Trace, traces_of
from chunkft_compile.planner.bounds import depth_of

VERSION = 1


def to_data(planned: Plan) -> str:
    """The report as JSON text."""
    return json.dumps(report_data(planned), separators=(",", ":")) + "\n"


def report_data(planned: Plan) -> dict[str, Any]:
    """The report as lists, dicts and plain values."""
    problem, schedule = planned.problem, planned.schedule
    made_for = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(planned.fingerprint).items()}
    del made_for["chunks"]
    segments = [
        {"name": segment.name, "weight_nbytes": segment.weight_nbytes, "weights": str(place)}
        for segment, place in zip(problem.segments, schedule.places.weights, strict=True)
    ]
    chunks = [
        {
            "name": chunk.name,
            "segment": chunk.segment,
            "grad_nbytes": chunk.grad_nbytes,
            "state_nbytes": chunk.state_nbytes,
            "state": str(place),
        }
        for chunk, place in zip(problem.chunks, schedule.places.state, strict=True)
    ]
    return {
        "version": VERSION,
        "type": "chunkft report",
        "modelled": not planned.lowered,
        "made_for": made_for,
        "budget_nbytes": schedule.budget_nbytes,
        "peak_nbytes": schedule.peak_nbytes,
        "sweep_us": schedule.sweep_us,
        "status": schedule.status,
        "gap": schedule.gap,
        "solve_s": schedule.solve_s,
        "segments": segments,
        "chunks": chunks,
        "steps": [_step(problem, step, trace) for step, trace in zip(schedule.steps, traces_of(planned), strict=True)],
    }


def _step(problem: Problem, step: Step, trace: Trace) -> dict[str, Any]:
    return {
        "chunks": list(step.chunks),
        "options": list(step.options),
        "depth": depth_of(problem, step.chunks),
        "update": str(step.update),
        "us": step.us,
        "peak_nbytes": step.peak_nbytes,
        "binding": trace.binding,
        "time_us": trace.time_split(),
        "instants": [asdict(instant) for instant in trace.instants],
        "stacks": {str(category): stack for category, stack in trace.stacks().items()},
        "lifetimes": [asdict(lifetime) for lifetime in trace.lifetimes],
    }
