"""Checkpoints of a chunked training, and going on from them bit by bit.

A checkpoint is a directory that appears complete, by one rename. It holds weights, optimizer state by parameter and rows, gradients
between two backwards, the plan and the position in its sweep, random number generators, and what the loop hands over.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import chunkft_compile
from chunkft_compile.errors import CheckpointError, TrainingError
from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Plan, from_json, to_json
from chunkft_compile.resuming import Standing, standing_from_plain, standing_to_plain
from chunkft_compile.runtime.archive import (
    FORMAT,
    Archive,
    Manifest,
    describe,
    naming_the_need,
    read_manifest,
    seal,
    total_nbytes,
    write,
)
from chunkft_compile.runtime.directories import free_name, new_directory, publish, published, remove
from chunkft_compile.runtime.rng import rng_states, set_rng_states
from chunkft_compile.session import Session
from chunkft_compile.snapshots import (
    Placing,
    check_groups,
    chunk_values,
    extra_states,
    groups_of,
    holders_of,
    restore_groups,
    split_values,
    to_bytes,
    weights_of,
)

_LOOP, _PLAN = "training.pt", "plan.json"


def save_checkpoint(
    directory: str | Path,
    model: ChunkedModule,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    scheduler: Any = None,
    scaler: Any = None,
    extra: Any = None,
    keep: int = 2,
    weights: bool = True,
) -> Path:
    """Write everything that training goes on from to `directory/step-000120` (optimizer steps done) and give that path.

    `optimizer` is one, or all that train the model. `scheduler` and `scaler` (a `GradScaler`) are anything with `state_dict()`;
    `extra` is whatever the loop wants back (its place in the data), made of tensors, numbers, texts, lists and dicts. The last `keep`
    checkpoints stay, older ones are removed once the new one is on the disk. With `weights=False`, parameters and buffers of the model are
    not in it: keep `model.state_dict()` beside it, and load that before `load_checkpoint`.

    Between two backwards of one step, gradients are kept too. Those that an optimizer step has used are not: going on starts like after
    `zero_grad()`. Raises `TrainingError` in the middle of a step (between forward and backward, or where `update="immediate"` waits for
    `optimizer.step()`), `OSError` with the bytes that are needed where they cannot be written; then nothing in `directory` has changed.
    """
    if keep < 1:
        raise ValueError(f"keep is at least 1, not {keep}: the checkpoint that is written stays")
    session, optimizers = _session(model), _listed(optimizer)
    holders = holders_of(session, optimizers)
    _refuse_middle(model, session)
    held = session.held
    _refuse_overflow(session, held, scaler)

    session.stores.synchronize()  # stand-ins are read
    named, tied = weights_of(session.model) if weights else (None, {})
    tensors, plain = split_values(chunk_values(session, holders, held), session.chunks)
    standing = session.standing()
    loop = to_bytes(
        {
            "optimizers": [(type(one).__name__, groups_of(one, session.chunks)) for one in optimizers],
            "values": plain,
            "standing": standing_to_plain(standing),
            "rng": rng_states(session.device),
            "rounding": None if session.rounding.generator is None else session.rounding.generator.get_state(),
            "scheduler": _state_of(scheduler),
            "scaler": _state_of(scaler),
            "extra_states": extra_states(session.model),
            "extra": extra,
        }
    )
    return _write(Path(directory), standing, (named, tied), tensors, loop, keep)


def _write(
    parent: Path,
    standing: Standing,
    model: tuple[dict[str, torch.Tensor] | None, dict[str, str]],
    tensors: list[tuple[str, torch.Tensor]],
    loop: bytes,
    keep: int,
) -> Path:
    """All files of a checkpoint, then its name, then older ones go."""
    step, (named, tied) = standing.steps, model
    whole = list(named.items()) if named is not None else []
    nbytes = total_nbytes([*whole, *tensors]) + len(loop)
    with new_directory(parent, step) as hidden, naming_the_need(free_name(parent, step), nbytes):
        entries = write(hidden, "weights", whole) | write(hidden, "chunks", tensors)
        (hidden / _LOOP).write_bytes(loop)
        if standing.plan is not None:
            (hidden / _PLAN).write_text(to_json(standing.plan), encoding="utf-8")
        complete = _complete(parent)
        serial = 1 + max((manifest.serial for manifest, _ in complete), default=0)
        seal(hidden, Manifest(FORMAT, serial, step, _about(standing, named, tied), entries, {}))
        path = publish(hidden, step)
    for _, old in complete[: max(0, len(complete) + 1 - keep)]:
        remove(old)
    return path


def load_checkpoint(
    directory: str | Path,
    model: ChunkedModule,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    scheduler: Any = None,
    scaler: Any = None,
) -> Any:
    """Go on from a checkpoint: `directory`, or the latest in it. Gives what was saved as `extra`.

    Call it after `compile()` and when optimizers and scheduler are built, as for the run that was saved, and before the first training
    call. With the same budget, choices and batches, training goes on bit by bit as if it had not stopped, under the same schedule. With
    others the schedule is made anew for the rest of the sweep, and where chunks are others their optimizer state is cut and joined by
    rows: a chunk counts as trained in this sweep if all its rows were. Where its rows were trained a different number of times, which the
    middle of a sweep makes one, it goes on with the larger number, with a warning.

    Raises `CheckpointError` for a checkpoint that is damaged, of another model or other optimizers, or whose state cannot be cut for other
    chunks, before anything has changed; random number generators go on where they were.
    """
    session, optimizers = _session(model), _listed(optimizer)
    holders = holders_of(session, optimizers)
    with Archive(_found(Path(directory))) as archive:
        loop = _read_loop(archive)
        standing = standing_from_plain(loop["standing"], _read_plan(archive))
        named, tied = weights_of(session.model) if archive.manifest.about["weights"] is not None else ({}, {})
        _check_weights(archive.manifest, named, tied)
        if loop["extra_states"].keys() != extra_states(session.model).keys():
            raise CheckpointError("the checkpoint is of another model: other modules keep a state of their own (get_extra_state)")
        _check_optimizers(loop["optimizers"], optimizers, session)
        _check_state("scheduler", loop["scheduler"], scheduler)
        _check_state("scaler", loop["scaler"], scaler)
        values = chunk_values(session, holders, frozenset())
        placing = Placing(archive, standing.chunks, loop["values"], values, session.chunks)
        session.check(standing, held=any(name.endswith("].grad") for name in archive.manifest.tensors))

        session.resume(standing)
        with torch.no_grad():
            for name in named:
                session.keeper.fill(name, partial(archive.copy, name))
            placing.put()
    for name, state in loop["extra_states"].items():
        session.model.get_submodule(name).set_extra_state(state)
    for (_, groups), one in zip(loop["optimizers"], optimizers, strict=True):
        restore_groups(groups, one)
    for saved, taker in ((loop["scheduler"], scheduler), (loop["scaler"], scaler)):
        if taker is not None:
            taker.load_state_dict(saved[1])
    set_rng_states(loop["rng"], session.device)
    if session.rounding.generator is not None and loop["rounding"] is not None:
        session.rounding.generator.set_state(loop["rounding"])
    _warn_of_uneven(placing.uneven)
    return loop["extra"]


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint in `directory` that was written last, incomplete ones aside; None where there is none."""
    complete = _complete(Path(directory))
    return complete[-1][1] if complete else None


def _session(model: ChunkedModule) -> Session:
    if not isinstance(model, ChunkedModule):
        raise TypeError(f"a checkpoint is of a model that chunkft_compile.compile() gave, not of a {type(model).__name__}")
    return model._session


def _listed(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def _refuse_middle(model: ChunkedModule, session: Session) -> None:
    if model.in_forward:
        raise TrainingError(
            "a checkpoint between a training forward and its backward would lose the forward; call loss.backward() first, or drop the "
            "loss (del loss)"
        )
    session.settle()


def _refuse_overflow(session: Session, held: frozenset[int], scaler: Any) -> None:
    """A step that the scaler skipped leaves its gradients, and they look like those of an unfinished step."""
    gradients = [session.chunks[number].leaf.grad for number in sorted(held)] if scaler is not None else []
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients):
        raise TrainingError(
            "there are gradients that are not finite, as after a step that the scaler skipped; call optimizer.zero_grad() first"
        )


def _warn_of_uneven(chunks: Sequence[str]) -> None:
    if chunks:
        warnings.warn(
            f"{len(chunks)} chunks join rows that were trained a different number of times, and go on with the larger number: "
            f"{', '.join(chunks[:3])}, ... A checkpoint between two sweeps has no such difference",
            stacklevel=3,
        )


def _state_of(one: Any) -> tuple[str, Any] | None:
    return None if one is None else (type(one).__name__, one.state_dict())


def _about(standing: Standing, named: Mapping[str, torch.Tensor] | None, tied: Mapping[str, str]) -> dict[str, Any]:
    return {
        "chunkft_compile": chunkft_compile.__version__,
        "torch": str(torch.__version__),
        "graph": standing.plan.fingerprint.graph if standing.plan is not None else None,
        "weights": None if named is None else list(named),
        "tied": dict(tied),
    }


def _complete(parent: Path) -> list[tuple[Manifest, Path]]:
    """Checkpoints that have all their files, oldest first."""
    found = []
    for path in published(parent):
        try:
            found.append((read_manifest(path), path))
        except CheckpointError:
            continue  # not one to go on from, and not ours to remove
    return sorted(found, key=lambda pair: pair[0].serial)


def _found(directory: Path) -> Path:
    if (directory / "manifest.json").exists() or directory.name.startswith("step-"):
        return directory
    latest = latest_checkpoint(directory)
    if latest is None:
        raise CheckpointError(f"there is no complete checkpoint in {directory}")
    return latest


def _read_loop(archive: Archive) -> Any:
    try:
        return torch.load(archive.directory / _LOOP, weights_only=True, map_location="cpu")
    except Exception as error:  # its checksum was right, so another version of torch wrote it
        raise CheckpointError(f"{_LOOP} of {archive.directory} cannot be read by torch {torch.__version__}: {error}") from error


def _read_plan(archive: Archive) -> Plan | None:
    if _PLAN not in archive.manifest.files:
        return None
    try:
        return from_json((archive.directory / _PLAN).read_text(encoding="utf-8"), Plan)
    except ValueError as error:
        raise CheckpointError(f"{_PLAN} of {archive.directory} cannot be read by this version of the library: {error}") from error


def _check_weights(manifest: Manifest, named: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    here = {name: describe(tensor) for name, tensor in named.items()}
    there = {name: (entry.dtype, entry.shape) for name in manifest.about["weights"] or () for entry in (manifest.tensors[name],)}
    for name in [*there, *here]:
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {_text(there.get(name))} there and {_text(here.get(name))} here"
            )
    if dict(tied) != manifest.about["tied"]:
        names = sorted({*dict(tied).items()} ^ {*manifest.about["tied"].items()})[0]
        raise CheckpointError(f"the checkpoint is of another model: {names[0]} and {names[1]} are one tensor in only one of the two")


def _text(described: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if described is None else f"{described[0]} {list(described[1])}"


def _check_optimizers(kept: Sequence[tuple[str, Any]], optimizers: Sequence[Optimizer], session: Session) -> None:
    names, here = [name for name, _ in kept], [type(optimizer).__name__ for optimizer in optimizers]
    if names != here:
        raise CheckpointError(
            f"the checkpoint was trained with {', '.join(names)}, and here is {', '.join(here)}; build the same, in this order"
        )
    for (_, groups), optimizer in zip(kept, optimizers, strict=True):
        check_groups(groups, optimizer, session.chunks)


def _check_state(what: str, kept: tuple[str, Mapping[str, Any]] | None, taker: Any) -> None:
    if taker is None:
        if kept is not None:
            raise CheckpointError(f"the checkpoint has the state of a {kept[0]}; pass it as {what}=, or the run would go on without it")
        return
    if kept is None:
        raise CheckpointError(f"the checkpoint has no {what}, and {what}= is a {type(taker).__name__}: leave it out, and set it by hand")
    if kept[0] != type(taker).__name__ or kept[1].keys() != taker.state_dict().keys():
        raise CheckpointError(f"the checkpoint has the state of a {kept[0]}, and {what}= is a {type(taker).__name__} with other state")
