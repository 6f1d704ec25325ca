"""Where training stands, in a form to keep; and whether the plan of a checkpoint is still the one to go on with."""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chunkft_compile.compiled import Compiled
from chunkft_compile.errors import CheckpointError, PlanMismatch
from chunkft_compile.planner import Plan, Schedule, check_fingerprint, from_json, to_json
from chunkft_compile.runtime.rows import Span, sources
from chunkft_compile.runtime.sweep import SweepState
from chunkft_compile.solving import fingerprint

if TYPE_CHECKING:
    from chunkft_compile.session import Options

logger = logging.getLogger("chunkft_compile")

Choices = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """`steps` optimizer steps are done; `state` is in chunk numbers, which `chunks` name. `choices` are what the plan was asked for.

    `plan` is None before the first training call, and where another one has to be made.
    """

    steps: int
    chunks: tuple[str, ...]
    choices: Choices
    accumulating: bool
    state: SweepState
    plan: Plan | None


def choices(options: "Options") -> Choices:
    """What decides which schedule is wanted, as plain values. How hard the solver looks for it does not."""
    solving, plan = options.solving, options.plan
    return {
        "budget_nbytes": options.budget_nbytes,
        "accumulation": options.accumulation,
        "update": [str(update) for update in options.updates],
        "outputs": "loss" if options.loss_only else "all",
        "precision": str(options.precision),
        "prefer": solving.prefer,
        "max_steps": solving.max_steps,
        "options": list(solving.options) if solving.options else None,
        "state": [str(place) for place in solving.state] if solving.state else None,
        "weights": [str(place) for place in solving.weights] if solving.weights else None,
        "schedule": hashlib.sha256(to_json(plan.schedule).encode()).hexdigest() if plan is not None else None,
    }


def translated(standing: Standing, chunks: tuple[str, ...], wanted: Choices) -> Standing:
    """The same for other chunks and choices, with no plan where one of these differs.

    A chunk counts as trained in this sweep if all of its rows were.
    """
    changed = _changes(standing, chunks, wanted)
    if not changed:
        return standing
    if standing.plan is not None:
        logger.info("planning again: the checkpoint was planned for %s", changed)
    done = {standing.chunks[number] for number in standing.state.trained | standing.state.stepped}
    made_of = sources([Span.parse(name) for name in chunks], map(Span.parse, standing.chunks))
    trained = frozenset(number for number, cuts in enumerate(made_of.values()) if all(cut.source in done for cut in cuts))
    return replace(standing, chunks=chunks, choices=wanted, state=SweepState(standing.state.count, trained), plan=None)


def refuse_part(standing: Standing, chunks: tuple[str, ...], wanted: Choices) -> None:
    """Raise `CheckpointError` where another schedule would have to take over the gradients of an unfinished step."""
    if changed := _changes(standing, chunks, wanted):
        raise CheckpointError(
            f"the checkpoint was made between two backwards of one step, whose gradients belong to its schedule, and was planned for "
            f"{changed}. Resume with the same, or from a checkpoint made after optimizer.step()"
        )


def _changes(standing: Standing, chunks: tuple[str, ...], wanted: Choices) -> str:
    """How choices and chunks differ; empty where they do not."""
    kept = standing.choices
    changed = [f"{name}={kept.get(name)!r} (here {wanted.get(name)!r})" for name in wanted if kept.get(name) != wanted[name]]
    return ", ".join(changed) or ("" if chunks == standing.chunks else "other chunks")


def fitting(compiled: Compiled, standing: Standing, *, accumulating: bool) -> bool:
    """Whether the plan of a checkpoint can go on with this signature; a warning says why not.

    As in a run that was never interrupted, a batch of another shape does not end a schedule: the bytes of every step are checked
    before it is run.
    """
    plan = standing.plan
    if plan is None:
        return False
    # the optimizer's class was compared when the checkpoint was loaded; at planning it may have been assumed
    here = replace(fingerprint(compiled, accumulating=accumulating), optimizer=plan.fingerprint.optimizer)
    if here.inputs != plan.fingerprint.inputs:
        here = replace(here, inputs=plan.fingerprint.inputs, graph=plan.fingerprint.graph)  # shapes are in the graph's hash
    try:
        check_fingerprint(plan.fingerprint, here)
    except PlanMismatch as error:
        warnings.warn(f"planning again, so the run does not go on bit by bit as it would have: {error}", stacklevel=2)
        return False
    if not all(compiled.offers(step) for step in standing.state.steps):
        warnings.warn("planning again: this batch has other segments or options than the plan of the checkpoint", stacklevel=2)
        return False
    return True


def standing_to_plain(standing: Standing) -> dict[str, Any]:
    """As values for `torch.save`; steps are a schedule of their own, to share its text form."""
    state, plan = standing.state, standing.plan
    left = None if plan is None else to_json(replace(plan.schedule, steps=state.steps))
    return {
        "steps": standing.steps,
        "chunks": list(standing.chunks),
        "choices": dict(standing.choices),
        "accumulating": standing.accumulating,
        "count": state.count,
        "trained": sorted(state.trained),
        "stepped": sorted(state.stepped),
        "left": left,
    }


def standing_from_plain(plain: Mapping[str, Any], plan: Plan | None) -> Standing:
    """The opposite of `standing_to_plain`."""
    left = () if plain["left"] is None else from_json(plain["left"], Schedule).steps
    state = SweepState(plain["count"], frozenset(plain["trained"]), frozenset(plain["stepped"]), left)
    return Standing(plain["steps"], tuple(plain["chunks"]), plain["choices"], plain["accumulating"], state, plan)
