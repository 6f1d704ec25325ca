"""A plan against a run of it, as text: what was planned, what it took, and where the two differ most."""

from collections.abc import Callable, Sequence

from tabulate import tabulate

from chunkft_compile.planner import Plan
from chunkft_compile.planner.units import format_change, format_nbytes, format_us
from chunkft_compile.reports.runs import ComparedStep, Comparison, Difference, Run, compare
from chunkft_compile.run_lines import Memory

_STEPS = 20  # of a longer sweep, those that differ most

_MEMORY = {
    Memory.EXACT: "measured peaks are exact",
    Memory.AT_LEAST: "measured peaks are lower bounds",
    Memory.NONE: "memory was not measured",
}


def format_comparison(plan: Plan, run: Run, *, markdown: bool = False) -> str:
    """What `compare` finds, as tables of plain text or Markdown. Raises what `compare` raises."""
    found, header = compare(plan, run), run.header
    title = f"Planned against measured: {len(found.steps)} of {found.planned_steps} steps of the sweep were recorded"
    bullet = "- " if markdown else ""
    lines = [
        f"# {title}" if markdown else title,
        "",
        f"{bullet}device {header.device}, torch {header.torch}, {len(run.steps)} steps from {header.started} on",
        f"{bullet}{_MEMORY[found.memory]}: {found.memory_note}",
        *(f"{bullet}left out: {count} x {reason}" for reason, count in found.left_out),
        *_moved(found, bullet),
        *([f"{bullet}the last line of the run was cut off, as in a run that was killed"] if run.torn else []),
        *_section("steps" + _shortened(found), *_steps(found), markdown=markdown),
        *_section("what instructions do, in all steps above", *_ops(found), markdown=markdown),
        *_section("instructions whose times differ most (medians over sweeps)", *_differing(found.times(), format_us), markdown=markdown),
    ]
    if found.memory is not Memory.NONE:
        lines += _section("instructions whose peaks differ most", *_differing(found.peaks(), format_nbytes), markdown=markdown)
    return "\n".join(lines)


def _section(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> list[str]:
    """A titled table; texts stand left, figures right."""
    if not rows:
        return ["", f"{title}: none differ"]
    align = ["left" if header in ("instruction", "operation") else "right" for header in headers]
    table = tabulate(rows, headers, tablefmt="github" if markdown else "simple", colalign=align, disable_numparse=True)
    return ["", f"## {title}" if markdown else f"{title}:", "", *(line.rstrip() for line in table.splitlines())]


def _moved(found: Comparison, bullet: str) -> list[str]:
    moved = [str(step.number + 1) for step in found.steps if step.moved]
    if not moved:
        return []
    shown = ", ".join(moved[:_STEPS]) + (", ..." if len(moved) > _STEPS else "")
    return [
        f"{bullet}copies of {len(moved)} steps ({shown}) began elsewhere than planned, as link speeds were measured anew: peaks may differ"
    ]


def _shortened(found: Comparison) -> str:
    return f" ({_STEPS} of {len(found.steps)}, whose times differ most)" if len(found.steps) > _STEPS else ""


def _steps(found: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    shown = sorted(found.steps, key=lambda step: -abs(step.measured_us - step.planned_us))[:_STEPS]
    rows = [_step(step, found) for step in sorted(shown, key=lambda step: step.number)]
    rows.append(["all", "", format_us(found.planned_us), format_us(found.measured_us), _percent(found.planned_us, found.measured_us)])
    return ("step", "sweeps", "planned time", "measured", "differs", "planned peak", "measured"), [_filled(row, 7) for row in rows]


def _step(step: ComparedStep, found: Comparison) -> list[str]:
    return [
        f"{step.number + 1}/{found.planned_steps}",
        str(step.sweeps),
        format_us(step.planned_us),
        format_us(step.measured_us),
        _percent(step.planned_us, step.measured_us),
        format_nbytes(step.planned_nbytes),
        "" if step.measured_nbytes is None else format_nbytes(step.measured_nbytes),
    ]


def _filled(row: Sequence[str], length: int) -> list[str]:
    return [*row, *[""] * (length - len(row))]


def _ops(found: Comparison) -> tuple[Sequence[str], list[list[str]]]:
    rows = [[op, format_us(planned), format_us(measured), _percent(planned, measured)] for op, (planned, measured) in found.by_op().items()]
    return ("operation", "planned time", "measured", "differs"), rows


def _differing(found: Sequence[Difference], form: Callable[[int], str]) -> tuple[Sequence[str], list[list[str]]]:
    rows = [
        [str(one.step + 1), str(one.instant + 1), one.name, form(one.planned), form(one.measured), format_change(one.over, form)]
        for one in found
    ]
    return ("step", "number", "instruction", "planned", "measured", "over"), rows


def _percent(planned: int, measured: int) -> str:
    """`+12 %`, or `12 x` from ten times on; nothing where nothing was planned."""
    if not planned:
        return ""
    return f"{measured / planned:.0f} x" if measured >= 10 * planned else f"{100 * (measured - planned) / planned:+.0f} %"
