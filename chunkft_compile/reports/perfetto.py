"""A sweep in the Trace Event Format of Chrome, for https://ui.perfetto.dev and chrome://tracing.

Times are those of the plan, in microseconds from the beginning of the sweep, steps one after the other. One process with four rows: the
steps, the engine (forward and backward calls), copies (and what they are waited for), the optimizer. Three counters: what memory holds by
category (stacked), the peak of every instruction, and the budget.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from chunkft_compile.planner import Category, Instant, Op, Plan, Trace, traces_of
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.summary import how_sure, steps_word

_PROCESS = 1
_ROWS = ("steps", "engine", "copies", "optimizer")  # the thread of a row is its place here, from 1 on: 0 is no thread
_ROW_OF = {Op.FORWARD: "engine", Op.BACKWARD: "engine", Op.UPDATE: "optimizer", Op.FETCH: "copies", Op.EVICT: "copies", Op.FREE: "copies"}


def to_perfetto(planned: Plan) -> str:
    """The trace as one JSON text."""
    events = [*_rows(planned), *_events(planned)]
    other = {"made for": f"{planned.fingerprint.device}, {', '.join(planned.fingerprint.inputs)}", "figures": how_sure(planned)}
    return json.dumps({"displayTimeUnit": "ms", "otherData": other, "traceEvents": events}, separators=(",", ":")) + "\n"


def _rows(planned: Plan) -> Iterator[dict[str, Any]]:
    schedule = planned.schedule
    name = f"one sweep: {steps_word(len(schedule.steps))}, {format_us(schedule.sweep_us)}, budget {format_nbytes(schedule.budget_nbytes)}"
    if not planned.lowered:
        name += ", modelled"
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "tid": 0, "args": {"name": name}}
    for row in _ROWS:
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": _thread(row), "args": {"name": row}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": _thread(row), "args": {"sort_index": _thread(row)}}


def _events(planned: Plan) -> Iterator[dict[str, Any]]:
    start_us, traces = 0, traces_of(planned)
    budget = planned.schedule.budget_nbytes
    stacks = [trace.stacks() for trace in traces]
    used = [category for category in Category if any(any(of_step[category]) for of_step in stacks)]
    yield _counter("budget", 0, {"bytes": budget})
    for number, (step, trace, of_step) in enumerate(zip(planned.schedule.steps, traces, stacks, strict=True), 1):
        args = {
            "chunks": len(step.chunks),
            "gradient bytes": sum(planned.problem.chunks[index].grad_nbytes for index in step.chunks),
            "update": str(step.update),
            "peak bytes": trace.peak_nbytes,
            "free bytes": budget - trace.peak_nbytes,
            "at the peak": trace.instants[trace.binding].name,
            **{f"{what} us": us for what, us in trace.time_split().items()},
        }
        step_us = sum(instant.us for instant in trace.instants)
        yield _slice("steps", f"step {number} of {len(traces)}", start_us, step_us, args)
        yield from _instants(trace, of_step, start_us, used)
        start_us += step_us
    yield _counter("budget", start_us, {"bytes": budget})


def _instants(trace: Trace, stacks: dict[Category, list[int]], start_us: int, used: Sequence[Category]) -> Iterator[dict[str, Any]]:
    binding = trace.binding
    for number, instant in enumerate(trace.instants):
        args = {
            "instruction": number + 1,
            "peak bytes": instant.peak_nbytes,
            "workspace bytes": stacks[Category.WORKSPACE][number],
            **({"binds": "this is the peak of the step"} if number == binding else {}),
        }
        yield from _instant(instant, start_us, args)
        yield _counter("memory", start_us, {str(category): stacks[category][number] for category in used})
        yield _counter("peak", start_us, {"bytes": instant.peak_nbytes})
        start_us += instant.us


def _instant(instant: Instant, start_us: int, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A copy that is waited for comes before what waits for it; what takes no time is a mark."""
    row, work_us = _ROW_OF[instant.op], instant.us - instant.waited_us
    if row == "copies" and instant.us:
        yield _slice(row, instant.name, start_us, instant.us, args)
        return
    if instant.waited_us:
        yield _slice("copies", f"{instant.name} waits", start_us, instant.waited_us, {"instruction": args["instruction"]})
    if work_us:
        yield _slice(row, instant.name, start_us + instant.waited_us, work_us, args)
    else:
        where = {"pid": _PROCESS, "tid": _thread(row), "ts": start_us + instant.waited_us}
        yield {"ph": "i", "s": "t", "name": instant.name, "cat": row, **where, "args": args}


def _thread(row: str) -> int:
    return _ROWS.index(row) + 1


def _slice(row: str, name: str, start_us: int, us: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": row, "pid": _PROCESS, "tid": _thread(row), "ts": start_us, "dur": us, "args": args}


def _counter(name: str, us: int, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": _PROCESS, "tid": 0, "ts": us, "args": values}
