"""The lines of a recorded run: a JSON object each, with one key that says what it is.

    {"header": {...}}    the first one
    {"plan": {...}}      before the first program of it
    {"program": {...}}   before the first step that ran it
    {"step": {...}}      for every optimizer step

The fields are those of the classes here. A loss that is not finite is written as `NaN` or `Infinity`, as Python's `json` does.
"""

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from chunkft_compile.planner import Fingerprint, Schedule
from chunkft_compile.planner.schedules import read_value
from chunkft_compile.runtime.store import Traffic

VERSION = 1


class Memory(StrEnum):
    """What measured bytes are."""

    EXACT = "exact"  # the peak of every instruction
    AT_LEAST = "at least"  # what was live after it, or the device's peak where that rose
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Header:
    """`version` is that of the file, `library` and `torch` those that ran. `started` is UTC, ISO 8601.

    `memory` says what measured bytes are, and `memory_note` why.
    """

    version: int
    library: str
    torch: str
    device: str
    budget_nbytes: int
    started: str
    memory: Memory
    memory_note: str


@dataclass(frozen=True, slots=True)
class PlanLine:
    """A plan that steps ran under, counted from 0: another one where the model planned anew, or a batch had a plan of its own."""

    number: int
    fingerprint: Fingerprint
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class ProgramLine:
    """What a step of plan `plan` runs: step `planned` of its schedule, or None for a part of one. All numbers are from 0.

    `instants` are the instructions by name, in their order. Two plans of one schedule need not have the same order: copies begin as
    early as the speed of the ways to the stores asks for, which is measured anew by every process.
    """

    number: int
    plan: int
    planned: int | None
    instants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepLine:
    """One optimizer step: `step` in all, in sweep `sweep`, all counted from 0.

    It ran `program`; `differs` says what sets it apart from others that did, None if nothing. `at_us` is when it was complete, since
    `Header.started`, and `wall_us` its time, from the first forward on, with what the loop did in between. The other times are those of
    the device: `forward_us`, `backward_us` and `update_us` sums over all micro-batches (IMMEDIATE updates are in the backward),
    `instant_us` those of the instructions of its program, means over micro-batches. `peak_nbytes` and `instant_nbytes` are peaks as plans
    count them, None where nothing measures them. `traffic` are the copies that came to their end since the step before; those that a
    step begins last may end in the next one.
    """

    step: int
    sweep: int
    program: int
    differs: str | None
    loss: float | None
    micro_batches: int
    at_us: int
    wall_us: int
    forward_us: int
    backward_us: int
    update_us: int
    peak_nbytes: int | None
    traffic: Traffic
    instant_us: tuple[int, ...]
    instant_nbytes: tuple[int, ...] | None


Line = Header | PlanLine | ProgramLine | StepLine
_KINDS: dict[str, type[Line]] = {"header": Header, "plan": PlanLine, "program": ProgramLine, "step": StepLine}


def to_text(line: Line) -> str:
    """A line, with its end."""
    kind = next(kind for kind, made in _KINDS.items() if type(line) is made)
    # not `asdict`, which copies every number of a step
    flat = {field.name: getattr(line, field.name) for field in fields(line)}
    return json.dumps({kind: flat}, default=asdict, separators=(",", ":")) + "\n"


def from_text(text: str) -> Line:
    """What a line says. Anything unknown, missing or of a wrong type is a `ValueError` that names it."""
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(found, dict) or len(found) != 1 or (kind := next(iter(found))) not in _KINDS:
        raise ValueError(f"expected an object with one of the fields {', '.join(_KINDS)}, got {text[:60]!r}")
    if kind == "header" and isinstance(found[kind], dict) and found[kind].get("version", VERSION) != VERSION:
        raise ValueError(f"this run has version {found[kind]['version']!r}, this library reads version {VERSION}")
    line: Line = read_value(found[kind], _KINDS[kind], kind)
    return line
