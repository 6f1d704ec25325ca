"""The report page: one HTML file that needs no network. Plotly draws what `assets/page.js` takes from the data in it.

Everything the page shows comes from `traces_of(plan)` and the schedule. The data travel as compressed JSON: a sweep of hundreds of
steps has hundreds of thousands of numbers, which are much alike.
"""

import base64
import gzip
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib import import_module, resources
from typing import Any

from chunkft_compile.planner import Category, Fingerprint, Placement, Plan, Role, Step, Trace, traces_of
from chunkft_compile.planner.bounds import depth_of, roles_of
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.comparison import comparison_sections
from chunkft_compile.reports.document import Section
from chunkft_compile.reports.moments import time_split
from chunkft_compile.reports.points import Point
from chunkft_compile.reports.runs import Comparison, Run, compare
from chunkft_compile.reports.spans import rows_of
from chunkft_compile.reports.summary import by_place, fullest, steps_word

_SHOWN = 3  # tensors named in a sentence
_LONG = 17  # a word with fewer letters is never broken in a table
_SCRIPTS = ("units.js", "frame.js", "memory.js", "trained.js", "times.js", "page.js")


def make_page(planned: Plan, *, name: str = "", run: Run | None = None, points: Sequence[Point] = ()) -> str:
    """The page for a plan, which readers know as `name`; `points` are other budgets for its curve.

    What a recorded `run` really took is drawn over the plan. Raises `ValueError` if plotly is not installed, and what `compare` raises.
    """
    traces = traces_of(planned)
    comparison = compare(planned, run) if run is not None else None
    data = {
        "categories": list(Category),
        "budget": planned.schedule.budget_nbytes,
        "segments": [segment.name for segment in planned.problem.segments],
        "steps": [_step(planned, step, trace) for step, trace in zip(planned.schedule.steps, traces, strict=True)],
        "params": _params(planned),
        "points": [[point.budget_nbytes, point.sweep_us, point.steps] for point in points],
        "measured": _measured(comparison),
    }
    packed = base64.b64encode(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)).decode()
    parts = {
        "TITLE": html.escape(f"{name or 'plan'}: {format_nbytes(planned.schedule.budget_nbytes)} on {planned.fingerprint.device}"),
        "STYLE": _asset("page.css"),
        "VERDICT": _verdict(planned),
        "FIGURES": _figures(planned),
        "BINDING": html.escape(_binding_sentence(traces)),
        "TIME": html.escape(_time_sentence(traces)),
        "CURVE": html.escape(_curve_sentence(planned, points)),
        "COMPARISON": _comparison(comparison_sections(comparison, run) if comparison is not None and run is not None else ()),
        "FACTS": _facts(planned),
        "PLOTLY": plotly_script(),
        "DATA": packed,
        "SCRIPT": "\n".join(_asset(script) for script in _SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files("chunkft_compile.reports").joinpath("assets", name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """What draws the figures. Raises `ValueError` if plotly is not installed."""
    try:
        plotly = import_module("plotly.offline")
    except ModuleNotFoundError as error:
        way_out = "pip install 'chunkft_compile[report]', or choose another format"
        raise ValueError(f"the report page needs the package plotly: {way_out}") from error
    script: str = plotly.get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _step(planned: Plan, step: Step, trace: Trace) -> dict[str, Any]:
    """One step as the script reads it; names are numbers into its own list, which repeats little."""
    categories = list(Category)
    names = {name: number for number, name in enumerate(dict.fromkeys(lifetime.name for lifetime in trace.lifetimes))}
    roles = roles_of(planned.problem, step.chunks)
    return {
        "update": step.update,
        "us": step.us,
        "peak": trace.peak_nbytes,
        "binding": trace.binding,
        "chunks": len(step.chunks),
        "trained": sum(planned.problem.chunks[index].grad_nbytes for index in step.chunks),
        "depth": planned.problem.segments[depth_of(planned.problem, step.chunks)].name,
        "split": trace.time_split(),
        "instants": [[instant.name, instant.us, instant.waited_us, instant.peak_nbytes] for instant in trace.instants],
        "names": list(names),
        "lifetimes": [
            [names[lifetime.name], categories.index(lifetime.category), lifetime.nbytes, lifetime.first, lifetime.last]
            for lifetime in trace.lifetimes
        ],
        "options": ["forward only" if role is Role.FROZEN else option for role, option in zip(roles, step.options, strict=True)],
    }


def _params(planned: Plan) -> list[dict[str, Any]]:
    """Every parameter with the rows of its chunks and the steps (from 0) that train them, in the order of the model."""
    step_of = {index: number for number, step in enumerate(planned.schedule.steps) for index in step.chunks}
    found: dict[str, dict[str, Any]] = {}
    for index, chunk in enumerate(planned.problem.chunks):
        name, start, stop = rows_of(chunk.name)
        param = found.setdefault(name, {"name": name, "segment": chunk.segment, "rows": []})
        param["rows"].append([start, stop, step_of[index], chunk.grad_nbytes])
    return list(found.values())


def _measured(comparison: Comparison | None) -> list[dict[str, Any]]:
    if comparison is None:
        return []
    return [
        {
            "step": step.number,
            "us": step.measured_us,
            "nbytes": step.measured_nbytes,
            "instants": [instant.measured_nbytes for instant in step.instants],
        }
        for step in comparison.steps
    ]


def _verdict(planned: Plan) -> str:
    schedule = planned.schedule
    margin = schedule.budget_nbytes - schedule.peak_nbytes
    steps = len(schedule.steps)
    every = "every parameter is trained at every step" if steps == 1 else f"every parameter is trained once in {steps} steps"
    fits = "It fits" if planned.lowered else "It should fit"
    source = (
        "Bytes are exact: they were added up over the programs that run."
        if planned.lowered
        else "Modelled, not measured: bytes are the planner's bound, times come from data sheets, and nobody has run this on the device."
    )
    return (
        f"<p class='verdict'><strong>{fits}:</strong> {html.escape(every)}, with {_unbroken(format_nbytes(margin))} of "
        f"{_unbroken(format_nbytes(schedule.budget_nbytes))} to spare.</p>"
        f"<p class='{'exact' if planned.lowered else 'modelled'}'>{source}</p>"
    )


def _unbroken(figure: str) -> str:
    """A figure that stays on one line with its unit."""
    return figure.replace(" ", "\u00a0")


def _figures(planned: Plan) -> str:
    schedule = planned.schedule
    margin = schedule.budget_nbytes - schedule.peak_nbytes
    step_us = schedule.sweep_us // len(schedule.steps)
    pace = f"{format_us(step_us)} a step, {3_600_000_000 // max(1, step_us)} steps an hour"
    if planned.problem.accumulating:
        pace = f"{format_us(step_us)} a step, with one micro-batch each"
    away, where = _away(planned)
    gap = "nothing is proven: there may be much faster sweeps"
    if not schedule.gap:
        gap = "proven best for these chunks"
    elif schedule.gap < 1:
        gap = f"proven: no sweep of these chunks takes more than {schedule.gap:.1%} less time"
    rows = [
        ("peak", format_nbytes(schedule.peak_nbytes), f"{format_nbytes(margin)} below the budget"),
        ("budget", format_nbytes(schedule.budget_nbytes), planned.fingerprint.device),
        ("steps in a sweep", str(len(schedule.steps)), "T: after them everything was trained once"),
        ("time of a sweep", format_us(schedule.sweep_us), pace),
        ("beside the device", away, where),
        ("solver", schedule.status, gap),
    ]
    cells = [[html.escape(text) for text in row] for row in rows]
    return "".join(f"<div><dt>{name}</dt><dd><b>{value}</b><span>{note}</span></dd></div>" for name, value, note in cells)


def _away(planned: Plan) -> tuple[str, str]:
    """How much the places beside the device must hold, and of what. Saved values that wait there for their backward come on top."""
    parts = [(nbytes, f"{format_nbytes(nbytes)} {what} on {place}") for nbytes, what, place in _elsewhere(planned)]
    if not parts:
        return "nothing", "optimizer state and weights stay on the device"
    return format_nbytes(sum(nbytes for nbytes, _ in parts)), "; ".join(text for _, text in parts)


def _elsewhere(planned: Plan) -> Iterator[tuple[int, str, Placement]]:
    for what, sizes in by_place(planned).items():
        for place, nbytes in sizes.items():
            if nbytes and place is not Placement.DEVICE:
                yield nbytes, what, place


def _binding_sentence(traces: Sequence[Trace]) -> str:
    """Which instruction of which step decides the peak, and what is there then."""
    number = fullest(traces)
    trace = traces[number]
    instant = trace.instants[trace.binding]
    largest = ", ".join(f"{format_nbytes(lifetime.nbytes)} {lifetime.name}" for lifetime in trace.live_at(trace.binding)[:_SHOWN])
    return f"The peak of {format_nbytes(instant.peak_nbytes)} is at {instant.name} in step {number + 1} of {len(traces)}: {largest}."


def _time_sentence(traces: Sequence[Trace]) -> str:
    totals = time_split(traces)
    hidden = totals.pop("hidden transfers")
    whole = max(1, sum(totals.values()))
    shares = ", ".join(f"{name} {us / whole:.0%}" for name, us in totals.items() if us)
    waits = totals["exposed transfers"]
    if not hidden + waits:
        return f"A sweep is {shares}. Nothing is copied."
    return f"A sweep is {shares}. Of {format_us(hidden + waits)} of copies, {hidden / (hidden + waits):.0%} hide behind compute."


def _curve_sentence(planned: Plan, points: Sequence[Point]) -> str:
    if not points:
        return ""
    schedule = planned.schedule
    note = "Without a search, and with the chunks of this plan: planning for another budget may find faster sweeps."
    if planned.lowered:
        note += " Their times are the planner's bounds, that of this plan is of its programs, and may be some per cent more or less."
    faster = [point for point in points if point.budget_nbytes > schedule.budget_nbytes and point.sweep_us < schedule.sweep_us]
    best = min(faster, key=lambda point: point.sweep_us, default=None)
    if best is None:
        return f"More memory buys no faster sweep. {note}"
    ratio = schedule.sweep_us / best.sweep_us
    return f"{format_nbytes(best.budget_nbytes)} would make a sweep {ratio:.2f} times as fast, in {steps_word(best.steps)}. {note}"


def _comparison(sections: Sequence[Section]) -> str:
    """Planned against measured, as other formats have it; nothing without a run."""
    if not sections:
        return ""
    first, *others = sections
    heading = f"<h2 id='h-run'>{html.escape(first.title)}</h2>"
    parts = "".join(f"<h3>{html.escape(section.title)}</h3>{_body(section)}" for section in others)
    return f"<section aria-labelledby='h-run'>{heading}{_body(first)}{parts}</section>"


def _body(section: Section) -> str:
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in section.sentences)
    return (f"<ul>{sentences}</ul>" if sentences else "") + "".join(_table(table.headers, table.rows) for table in section.tables)


def _facts(planned: Plan) -> str:
    """Fingerprint, solver and placements, as two tables."""
    schedule, problem = planned.schedule, planned.problem
    state, weights = map(_placed, by_place(planned).values())
    made_for = [(field.name, _fact(field.name, getattr(planned.fingerprint, field.name))) for field in fields(Fingerprint)]
    solved = [
        ("status", schedule.status),
        ("gap", f"{schedule.gap:.2%}"),
        ("solved in", f"{schedule.solve_s:.1f} s"),
        ("updates", ", ".join(sorted({step.update for step in schedule.steps}))),
        ("optimizer state", state),
        ("weights that can move", weights),
        *(
            (f"to and from {link.placement}", f"{format_nbytes(link.read_bytes_per_s)}/s in, {format_nbytes(link.write_bytes_per_s)}/s out")
            for link in problem.links
        ),
    ]
    return f"<h3>Fingerprint</h3>{_table((), made_for)}<h3>Solver and places</h3>{_table((), solved)}"


def _fact(name: str, value: Any) -> str:
    if name == "chunks":
        return f"{len(value)}, {value[0]} to {value[-1]}"
    return "; ".join(value) if isinstance(value, tuple) else str(value)


def _placed(sizes: dict[Placement, int]) -> str:
    return ", ".join(f"{format_nbytes(nbytes)} on the {place}" for place, nbytes in sizes.items() if nbytes) or "none"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; without a head, the first cells are those of its rows."""
    header = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    top = f"<thead><tr>{header}</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(_cell(cell, names=not header and n == 0) for n, cell in enumerate(row)) + "</tr>" for row in rows)
    return f"<div class='scroll' tabindex='0'><table>{top}<tbody>{body}</tbody></table></div>"


def _cell(text: str, *, names: bool) -> str:
    if names:
        return f"<th scope='row'>{html.escape(text)}</th>"
    short = all(len(word) < _LONG for word in text.split())
    return f"<td{' class=short' if short else ''}>{html.escape(text)}</td>"
