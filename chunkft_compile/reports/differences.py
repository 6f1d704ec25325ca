"""Two plans side by side: what they were made for, what they cost, and what each segment and chunk does differently in them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from chunkft_compile.planner import Plan, Trace, traces_of
from chunkft_compile.planner.bounds import depth_of
from chunkft_compile.planner.schedules import compress
from chunkft_compile.planner.units import format_change, format_nbytes, format_us
from chunkft_compile.reports.document import Section, Table
from chunkft_compile.reports.moments import share, time_split
from chunkft_compile.reports.spans import rows_of, spans
from chunkft_compile.reports.summary import by_place, fingerprint_rows, fullest, how_sure

_SPANS = 8  # of each sweep, to see what is trained when
_NAMED = 3  # parameters
_SMALL = 0.001  # of all gradients


def differences(a: Plan, b: Plan) -> list[Section]:
    """What `b` has other than `a`: a verdict first, then everything that can be compared."""
    sections = [Section(_verdict(a, b), tuple(_certainty(a, b))), _made_for(a, b), _figures(a, b)]
    if same_model(a, b):
        sections += [_options(a, b), _moves(a, b)]
    return sections


def same_model(a: Plan, b: Plan) -> bool:
    """Whether both train the same rows of the same parameters in the same segments, in whatever chunks and for whatever batch."""
    segments = [[segment.name for segment in plan.problem.segments] for plan in (a, b)]
    return _parameters(a) == _parameters(b) and segments[0] == segments[1]


def _verdict(a: Plan, b: Plan) -> str:
    """What the second plan buys with what it has more, in one sentence."""
    more, ratio = b.schedule.budget_nbytes - a.schedule.budget_nbytes, a.schedule.sweep_us / max(1, b.schedule.sweep_us)
    steps = f"T {len(a.schedule.steps)} -> {len(b.schedule.steps)}"
    times = f"{format_us(a.schedule.sweep_us)} -> {format_us(b.schedule.sweep_us)} per sweep"
    if not same_model(a, b):
        return f"Plans of different models: {steps}, {times}; only figures are compared"
    if not more:
        speed = "is as fast" if _alike(ratio) else f"is {_times(ratio)}"
        return f"In the same budget the second plan {speed}: {steps}, {times}"
    size = format_nbytes(abs(more), up=True)
    if _alike(ratio):
        return f"{size} {'more buy nothing' if more > 0 else 'less cost nothing'}: {steps}, {times}"
    if more > 0:
        return (
            f"{size} more buy {ratio:.3g}x the speed: {steps}, {times}"
            if ratio > 1
            else f"{size} more, and yet {_times(ratio)}: {steps}, {times}"
        )
    return f"{size} less, and {_times(ratio)}: {steps}, {times}"


def _alike(ratio: float) -> bool:
    return 0.995 < ratio < 1.005


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x as fast" if ratio > 1 else f"{1 / ratio:.3g}x as slow"


def _certainty(a: Plan, b: Plan) -> Iterator[str]:
    said = {how_sure(a): "first", how_sure(b): "second"}
    if len(said) == 1:
        yield how_sure(a)
        return
    for sentence, which in said.items():
        yield f"The {which}: {sentence}"


def _made_for(a: Plan, b: Plan) -> Section:
    first, second = fingerprint_rows(a), fingerprint_rows(b)
    rows = [(name, first[name], second[name]) for name in first if first[name] != second[name]]
    sentences = [*_strangers(a, b, "first"), *_strangers(b, a, "second")]
    if not rows and not sentences:
        same = "the same chunks" if a.fingerprint.chunks == b.fingerprint.chunks else "chunks cut elsewhere"
        return Section("Made for", (f"Both for the same model, batch, optimizer and device, with {same}.",))
    return Section("Made for", tuple(sentences), (Table(("", "first", "second"), tuple(rows), frozenset({0, 1, 2})),))


def _strangers(plan: Plan, other: Plan, which: str) -> Iterator[str]:
    """Parameters that one plan alone trains."""
    known = _parameters(other)
    names = [name for name in _parameters(plan) if name not in known]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"Only the {which} trains {', '.join(names[:_NAMED])}{more}."


def _parameters(plan: Plan) -> dict[str, int]:
    """How many rows of each parameter are trained."""
    found: dict[str, int] = {}
    for name in plan.fingerprint.chunks:
        parameter, start, stop = rows_of(name)
        found[parameter] = found.get(parameter, 0) + stop - start
    return found


def _figures(a: Plan, b: Plan) -> Section:
    first, second = _numbers(a), _numbers(b)
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys([*first, *second]):
        (before, form), (after, _) = first.get(name, (0, second.get(name, (0, str))[1])), second.get(name, (0, str))
        rows.append((name, form(before), form(after), format_change(after - before, form) if after != before else ""))
    bindings = [_binding(traces_of(plan)) for plan in (a, b)]
    rows.append(("peak at", *bindings, ""))
    rows.append(("updates", *(", ".join(sorted({step.update for step in plan.schedule.steps})) for plan in (a, b)), ""))
    rows.append(("status", *(f"{plan.schedule.status}, gap {plan.schedule.gap:.1%}" for plan in (a, b)), ""))
    return Section("Figures", (), (Table(("", "first", "second", "change"), tuple(rows)),))


def _numbers(plan: Plan) -> dict[str, tuple[int, Callable[[int], str]]]:
    """What can be compared as a number, and how it is written."""
    schedule = plan.schedule
    found: dict[str, tuple[int, Callable[[int], str]]] = {
        "budget": (schedule.budget_nbytes, format_nbytes),
        "peak": (schedule.peak_nbytes, format_nbytes),
        "free": (schedule.budget_nbytes - schedule.peak_nbytes, format_nbytes),
        "T": (len(schedule.steps), str),
        "sweep": (schedule.sweep_us, format_us),
    }
    found |= {what: (us, format_us) for what, us in time_split(traces_of(plan)).items() if us}
    for what, sizes in by_place(plan).items():
        found |= {f"{what} on the {place}": (nbytes, format_nbytes) for place, nbytes in sizes.items() if nbytes}
    return found


def _binding(traces: Sequence[Trace]) -> str:
    step = fullest(traces)
    return f"{traces[step].instants[traces[step].binding].name}, step {step + 1}"


def _options(a: Plan, b: Plan) -> Section:
    """Which segments do otherwise, by all options that they have in steps whose backward reaches them."""
    before, after = _chosen(a), _chosen(b)
    changes: dict[tuple[str, str], list[str]] = {}
    for segment, first, second in zip(a.problem.segments, before, after, strict=True):
        if first != second:
            changes.setdefault((first, second), []).append(segment.name)
    total = len(before)
    changed = sum(len(names) for names in changes.values())
    rows = [
        (str(len(names)), first, second, compress(names))
        for (first, second), names in sorted(changes.items(), key=lambda item: -len(item[1]))
    ]
    sentence = f"{changed} of {total} segments have other options, over all steps whose backward reaches them."
    return Section("Options", (sentence,), (Table(("segments", "first", "second", "which"), tuple(rows), frozenset({1, 2, 3})),))


def _chosen(plan: Plan) -> list[str]:
    """The options of each segment, in the order of the steps that use them."""
    found: list[dict[str, None]] = [{} for _ in plan.problem.segments]
    for step in plan.schedule.steps:
        for s in range(depth_of(plan.problem, step.chunks), len(found)):
            found[s][step.options[s]] = None
    return [", ".join(sorted(options)) or "none" for options in found]


def _moves(a: Plan, b: Plan) -> Section:
    """Which rows are trained in which step. Chunks may be cut elsewhere: rows are compared."""
    flows, total = Counter[tuple[str, str]](), 0
    there = _trained_in(b)
    for parameter, rows in _trained_in(a).items():
        for start, stop, first, row_nbytes in rows:
            for other_start, other_stop, second, _ in there[parameter]:
                nbytes = int(row_nbytes * max(0, min(stop, other_stop) - max(start, other_start)))
                flows[first, second] += nbytes
                total += nbytes
    large = {steps: nbytes for steps, nbytes in flows.items() if nbytes >= _SMALL * total}
    shown = [
        (f"{first} of {len(a.schedule.steps)}", f"{second} of {len(b.schedule.steps)}", format_nbytes(nbytes), share(nbytes, total))
        for (first, second), nbytes in large.items()
    ]
    if rest := total - sum(large.values()):
        shown.append(("other", "other", format_nbytes(rest), share(rest, total)))
    sentences = ["By the bytes of gradients; steps of long sweeps are taken together."]
    if len(a.schedule.steps) == len(b.schedule.steps):
        moved = sum(nbytes for (first, second), nbytes in flows.items() if first != second)
        sentences.insert(0, f"{format_nbytes(moved)} of {format_nbytes(total)} ({share(moved, total)}) are trained in another step.")
    return Section(
        "What is trained when",
        tuple(sentences),
        (Table(("step in the first", "in the second", "gradients", "share"), tuple(shown), frozenset({})),),
    )


def _trained_in(plan: Plan) -> dict[str, list[tuple[int, int, str, Fraction]]]:
    """Of each parameter the row ranges of its chunks, the steps that train them, and the bytes of the gradient of a row."""
    found: dict[str, list[tuple[int, int, str, Fraction]]] = {}
    for span in spans(plan.schedule, _SPANS):
        for index in span.chunks:
            chunk = plan.problem.chunks[index]
            name, start, stop = rows_of(chunk.name)
            found.setdefault(name, []).append((start, stop, span.name, Fraction(chunk.grad_nbytes, max(1, stop - start))))
    return found
