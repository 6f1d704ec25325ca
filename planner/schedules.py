"""Schedules and problems as text: JSON to keep, a table to read."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from types import GenericAlias, NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from tabulate import tabulate

from chunkft_compile.planner.artefacts import Plan
from chunkft_compile.planner.bounds import depth_of
from chunkft_compile.planner.problem import Placement, Problem, Schedule, Step
from chunkft_compile.planner.residency import transfer_us
from chunkft_compile.planner.units import format_nbytes, format_us

VERSION = 4

Stored = TypeVar("Stored", Problem, Schedule, Plan)


def to_json(value: Problem | Schedule | Plan) -> str:
    """A versioned JSON text that `from_json` reads back to an equal value."""
    return json.dumps({"version": VERSION, "type": type(value).__name__, "value": asdict(value)}, indent=1) + "\n"


def from_json(text: str, expected: type[Stored]) -> Stored:
    """The problem, schedule or plan in a text. Anything unknown, missing or of a wrong type is a `ValueError` that names it."""
    try:
        envelope = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(envelope, dict) or set(envelope) != {"version", "type", "value"}:
        raise ValueError("expected an object with the fields version, type and value")
    if envelope["version"] != VERSION:
        raise ValueError(f"this text has version {envelope['version']!r}, this library reads version {VERSION}: write it anew")
    if envelope["type"] != expected.__name__:
        raise ValueError(f"this text holds a {envelope['type']!r}, expected a {expected.__name__!r}")
    value = read_value(envelope["value"], expected, expected.__name__)
    assert isinstance(value, expected)
    return value


def read_value(value: Any, wanted: Any, where: str) -> Any:
    """What was read from JSON as the type `wanted`: a dataclass of such types, a tuple of one type, or a plain value.

    Anything unknown, missing or of a wrong type is a `ValueError` that names it; `where` is how it names `value`.
    """
    if is_dataclass(wanted):
        return _read_fields(value, wanted, where)
    if isinstance(wanted, GenericAlias):  # every tuple is of the form tuple[X, ...]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        item_type = get_args(wanted)[0]
        if set(map(type, value)) <= {item_type}:  # plain values, which a recorded run has by the million
            return tuple(value)
        return tuple(read_value(item, item_type, f"{where}[{number}]") for number, item in enumerate(value))
    if NoneType in get_args(wanted):  # the only unions are of the form X | None
        return None if value is None else read_value(value, get_args(wanted)[0], where)
    if isinstance(wanted, type) and issubclass(wanted, StrEnum):
        if value not in tuple(wanted):
            raise ValueError(f"{where} must be one of {', '.join(wanted)}, got {value!r}")
        return wanted(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:  # `isinstance` would take True for 1
        raise ValueError(f"{where} must be of type {wanted.__name__}, got {value!r}")
    return value


def _read_fields(value: Any, wanted: Any, where: str) -> Any:
    names = {field.name for field in fields(wanted)}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {value!r}")
    if unknown := sorted(set(value) - names):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}")
    if missing := sorted(names - set(value)):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    hints = get_type_hints(wanted)
    return wanted(**{name: read_value(value[name], hints[name], f"{where}.{name}") for name in sorted(names)})


def format_schedule(problem: Problem, schedule: Schedule) -> str:
    """A table with a row per step, then the totals."""
    rows = [_row(problem, step, f"{number}/{len(schedule.steps)}") for number, step in enumerate(schedule.steps, 1)]
    headers = ("step", "chunks", "trains", "segments", "depth", "options", "update", "peak", "time")
    align = ("right", "right", "right", "left", "left", "left", "left", "right", "right")
    table = tabulate(rows, headers, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join([*(line.rstrip() for line in table.splitlines()), "", *_totals(problem, schedule)])


def _row(problem: Problem, step: Step, number: str) -> tuple[str, ...]:
    chunks = [problem.chunks[index] for index in step.chunks]
    lowest = depth_of(problem, step.chunks)
    depth = problem.segments[lowest].name
    trained = compress([problem.segments[s].name for s in sorted({chunk.segment for chunk in chunks})])
    trains = format_nbytes(sum(chunk.grad_nbytes for chunk in chunks))
    peak, time = format_nbytes(step.peak_nbytes), format_us(step.us)
    return number, str(len(chunks)), trains, trained, depth, count_options(step.options[lowest:]), step.update, peak, time


def count_options(options: Sequence[str]) -> str:
    """How many segments have which option. Those below the depth are not among them: they keep nothing, whatever their option is.

    >>> count_options(["save", "cheap", "cheap", "save", "save", "tiled 8"])
    '3 save, 2 cheap, 1 tiled 8'
    """
    return ", ".join(f"{count} {option}" for option, count in Counter(options).items())


def compress(names: Sequence[str]) -> str:
    """`block 3, block 4, block 5, head` as `block 3-5, head`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition(' ')[2]}" for run in runs)


def _follows(name: str, following: str) -> bool:
    (word, _, number), (next_word, _, next_number) = name.rpartition(" "), following.rpartition(" ")
    return word == next_word and number.isdecimal() and next_number.isdecimal() and int(next_number) == int(number) + 1


def _totals(problem: Problem, schedule: Schedule) -> list[str]:
    state = _by_place(schedule.places.state, [chunk.state_nbytes for chunk in problem.chunks])
    weights = _by_place(schedule.places.weights, [segment.weight_nbytes for segment in problem.segments])
    moving = format_us(transfer_us(problem, schedule.places))
    return [
        f"{schedule.status}, gap {schedule.gap:.1%}, T = {len(schedule.steps)}, {format_us(schedule.sweep_us)} per sweep, "
        f"peak {format_nbytes(schedule.peak_nbytes)} of {format_nbytes(schedule.budget_nbytes)}",
        f"optimizer state: {state} ({moving} of transfers per sweep)",
        *([f"weights that can move: {weights}"] if problem.weights != (Placement.DEVICE,) else []),
    ]


def _by_place(places: Sequence[Placement], sizes: Sequence[int]) -> str:
    """How much is where: `400.0 MB on the device, 1.200 GB on the disk`."""
    there = {place: sum(nbytes for at, nbytes in zip(places, sizes, strict=True) if at is place) for place in Placement}
    return ", ".join(f"{format_nbytes(nbytes)} on the {place}" for place, nbytes in there.items() if nbytes or place is Placement.DEVICE)
