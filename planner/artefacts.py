"""A schedule to keep: what it was made for, the planner's question and its answer, as one versioned text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from chunkft_compile.planner.problem import Problem, Schedule

_SHOWN = 3  # names in an error message


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a schedule depends on. `graph` is a hash of the segments' graphs, `inputs` describes every input of the model.

    `chunks` are all chunks by name (`fqn[start:stop]`), so they tell the trainable set and how it was divided.
    """

    graph: str
    chunks: tuple[str, ...]
    inputs: tuple[str, ...]
    dtype: str
    device: str
    optimizer: str
    accumulating: bool
    torch: str
    precision: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule with its problem, and the fingerprint of what it runs on. Steps state exact peaks and times if `lowered`."""

    fingerprint: Fingerprint
    problem: Problem
    schedule: Schedule
    lowered: bool


class PlanMismatch(ValueError):
    """A plan that was made for something else; the message names every difference."""


def check_fingerprint(planned: Fingerprint, here: Fingerprint) -> None:
    """Raise `PlanMismatch` unless a plan for `planned` is one for `here`."""
    found = [
        line for field in fields(Fingerprint) for line in _differences(field.name, getattr(planned, field.name), getattr(here, field.name))
    ]
    if found:
        raise PlanMismatch(
            "this plan was made for something else:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nway out: plan again for this model, batch and optimizer, or use what the plan was made for"
        )


def _differences(name: str, planned: object, here: object) -> Iterator[str]:
    if planned == here:
        return
    if name == "graph":
        yield f"graph: the plan knows {planned}, this model is {here} (another architecture, size, attention or transformers version)"
    elif name == "chunks":
        assert isinstance(planned, tuple)
        assert isinstance(here, tuple)
        yield from _named("trained by the plan, not trainable here", [chunk for chunk in planned if chunk not in set(here)])
        yield from _named("trainable here, unknown to the plan", [chunk for chunk in here if chunk not in set(planned)])
        if set(planned) == set(here):
            yield "chunks: the same ones in another order"
    else:
        yield f"{name}: the plan has {_text(planned)}, here it is {_text(here)}"


def _named(what: str, chunks: Sequence[str]) -> Iterator[str]:
    if chunks:
        more = f" and {len(chunks) - _SHOWN} more" if len(chunks) > _SHOWN else ""
        yield f"chunks {what}: {', '.join(chunks[:_SHOWN])}{more}"


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
