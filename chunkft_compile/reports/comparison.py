"""A plan against a run of it: what was planned, what it took, and where the two differ most."""

from collections.abc import Callable, Iterator, Sequence
from statistics import quantiles

from chunkft_compile.planner.program import Op
from chunkft_compile.planner.units import format_change, format_nbytes, format_us
from chunkft_compile.reports.document import Section, Table
from chunkft_compile.reports.runs import ComparedStep, Comparison, Difference, Run
from chunkft_compile.run_lines import Memory

_STEPS = 20  # of a longer sweep, those that differ most
_SAME_PACE = 1.25  # a run slower or faster than planned by less is told by its figures alone
_TOLD_US = 100  # instructions of less are mostly the time of the call itself

_MEMORY = {
    Memory.EXACT: "measured peaks are exact",
    Memory.AT_LEAST: "measured peaks are lower bounds",
    Memory.NONE: "memory was not measured",
}


def comparison_sections(found: Comparison, run: Run) -> tuple[Section, ...]:
    """What `compare` found in this run, for `document.as_text`, `document.as_markdown` and the page."""
    title = f"Planned against measured: {len(found.steps)} of {found.planned_steps} steps of the sweep were recorded"
    return (
        Section(title, tuple(_sentences(found, run))),
        _section("Steps" + _shortened(found), _steps(found)),
        _section("What instructions do, in all steps above", _ops(found)),
        _section("Instructions whose times differ most (medians over sweeps)", _differing(found.times(), format_us)),
        *(
            []
            if found.memory is Memory.NONE
            else [_section("Instructions whose peaks differ most", _differing(found.peaks(), format_nbytes))]
        ),
    )


def _section(title: str, table: Table) -> Section:
    return Section(title, () if table.rows else ("None differ.",), (table,) if table.rows else ())


def _sentences(found: Comparison, run: Run) -> Iterator[str]:
    header = run.header
    yield f"device {header.device}, torch {header.torch}, {len(run.steps)} steps from {header.started} on"
    yield f"{_MEMORY[found.memory]}: {found.memory_note}"
    yield from _pace(found)
    for reason, count in found.left_out:
        yield f"left out: {count} x {reason}"
    moved = [str(step.number + 1) for step in found.steps if step.moved]
    if moved:
        shown = ", ".join(moved[:_STEPS]) + (", ..." if len(moved) > _STEPS else "")
        yield f"copies of {len(moved)} steps ({shown}) began elsewhere than planned, as link speeds were measured anew: peaks may differ"
    if run.torn:
        yield "the last line of the run was cut off, as in a run that was killed"


def _pace(found: Comparison) -> Iterator[str]:
    """Whether all computing was slower, or faster: then the machine differs from the one that was measured, not the plan."""
    instants = [instant for step in found.steps for instant in step.instants if instant.op in (Op.FORWARD, Op.BACKWARD)]
    ratios = [instant.measured_us / instant.planned_us for instant in instants if instant.planned_us >= _TOLD_US]
    if len(ratios) < 2:
        return
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    if max(middle, 1 / max(middle, 1e-9)) >= _SAME_PACE:
        yield (
            f"the middle one of all forwards and backwards took {middle:.2f} times as long as planned, "
            f"half of them {low:.2f} to {high:.2f} times: "
            f"the machine was {'slower, or busier,' if middle > 1 else 'faster, or had less else to do,'} than when operators were measured"
        )


def _shortened(found: Comparison) -> str:
    return f" ({_STEPS} of {len(found.steps)}, whose times differ most)" if len(found.steps) > _STEPS else ""


def _steps(found: Comparison) -> Table:
    shown = sorted(found.steps, key=lambda step: -abs(step.measured_us - step.planned_us))[:_STEPS]
    rows = [_step(step, found) for step in sorted(shown, key=lambda step: step.number)]
    whole = (format_us(found.planned_us), format_us(found.measured_us), _percent(found.planned_us, found.measured_us))
    rows.append(("all", "", *whole, "", ""))
    headers = ("step", "sweeps", "planned time", "measured", "differs", "planned peak", "measured")
    return Table(headers, tuple(rows), left=frozenset())


def _step(step: ComparedStep, found: Comparison) -> tuple[str, ...]:
    return (
        f"{step.number + 1}/{found.planned_steps}",
        str(step.sweeps),
        format_us(step.planned_us),
        format_us(step.measured_us),
        _percent(step.planned_us, step.measured_us),
        format_nbytes(step.planned_nbytes),
        "" if step.measured_nbytes is None else format_nbytes(step.measured_nbytes),
    )


def _ops(found: Comparison) -> Table:
    rows = [
        (str(op), format_us(planned), format_us(measured), _percent(planned, measured)) for op, (planned, measured) in found.by_op().items()
    ]
    return Table(("operation", "planned time", "measured", "differs"), tuple(rows))


def _differing(found: Sequence[Difference], form: Callable[[int], str]) -> Table:
    rows = [
        (str(one.step + 1), str(one.instant + 1), one.name, form(one.planned), form(one.measured), format_change(one.over, form))
        for one in found
    ]
    return Table(("step", "number", "instruction", "planned", "measured", "over"), tuple(rows), left=frozenset({2}))


def _percent(planned: int, measured: int) -> str:
    """`+12 %`, or `12 x` from ten times on; nothing where nothing was planned."""
    if not planned:
        return ""
    return f"{measured / planned:.0f} x" if measured >= 10 * planned else f"{100 * (measured - planned) / planned:+.0f} %"
