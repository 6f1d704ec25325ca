"""What a checkpoint holds of a training run, found in the objects of the loop and put back into them."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.errors import CheckpointError
from chunkft_compile.names import named_once
from chunkft_compile.runtime.archive import Archive, Entry
from chunkft_compile.runtime.chunk_values import ChunkValues, HeldGradients, OptimizerState
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.rows import Recipe, Reslicing, Span, sources
from chunkft_compile.session import Session

Plain = dict[str, dict[str, dict[str, Any]]]
"""Values that are no tensors, by mark, chunk and name."""


def weights_of(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All parameters and buffers in their own memory, each once; and the further names of tied ones, with the first.

    Buffers that `state_dict()` leaves out are among them: a model may change them while it trains.
    """
    named = named_once(module)
    return {first: tensor for tensor, (first, *_) in named}, {name: first for _, (first, *others) in named for name in others}


def extra_states(module: nn.Module) -> dict[str, Any]:
    """What modules keep beside parameters and buffers (`get_extra_state`), by module."""
    plain = nn.Module.get_extra_state
    return {name: part.get_extra_state() for name, part in module.named_modules() if type(part).get_extra_state is not plain}


def holders_of(session: Session, optimizers: Sequence[Optimizer]) -> dict[int, Optimizer]:
    """Optimizers by chunk number. Raises `ValueError` unless they hold every chunk once, and nothing that is not the model's."""
    number_of = {id(chunk.leaf): number for number, chunk in enumerate(session.chunks)}
    own = {id(parameter) for parameter in session.model.parameters()}
    holders: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if strangers := [parameter for parameter in held if id(parameter) not in number_of and id(parameter) not in own]:
            raise ValueError(
                f"{type(optimizer).__name__} also trains a tensor of shape {tuple(strangers[0].shape)} that is not the model's, so it has "
                f"no name to be kept under; give it an optimizer of its own, and keep that in extra="
            )
        for parameter in held:
            if (number := number_of.get(id(parameter))) is not None:
                if number in holders:
                    raise ValueError(f"two of the optimizers given hold {session.chunks[number].name}: pass each one once")
                holders[number] = optimizer
    missing = [chunk.name for number, chunk in enumerate(session.chunks) if number not in holders]
    if missing:
        raise ValueError(f"none of the optimizers given holds {missing[0]}: pass all that train the model, as a list")
    return holders


def chunk_values(session: Session, holders: Mapping[int, Optimizer], held: frozenset[int]) -> list[ChunkValues]:
    """All that belongs to rows of chunks beside their weights: what else there is joins here."""
    return [OptimizerState(session.chunks, holders, session.mover), HeldGradients(session.chunks, held)]


def split_values(values: Sequence[ChunkValues], chunks: Sequence[Chunk]) -> tuple[list[tuple[str, torch.Tensor]], Plain]:
    """Values of all chunks: the tensors by name, and the rest."""
    tensors: list[tuple[str, torch.Tensor]] = []
    plain: Plain = {}
    for kind in values:
        for number, chunk in enumerate(chunks):
            for key, value in kind.of(number).items():
                if isinstance(value, torch.Tensor):
                    tensors.append((f"{chunk.name}{kind.mark}{key}", _checked(chunk, key, value)))
                else:
                    plain.setdefault(kind.mark, {}).setdefault(chunk.name, {})[key] = value
    return tensors, plain


def _checked(chunk: Chunk, key: str, value: torch.Tensor) -> torch.Tensor:
    if type(value) is not torch.Tensor or value.layout is not torch.strided:
        raise TypeError(f"{key} of {chunk.name} is a {type(value).__name__} ({value.layout}); only plain tensors can be kept")
    return value


class Placing:
    """What of a checkpoint goes where in `chunks`, decided before anything is changed; see `Reslicing` for the refusals."""

    def __init__(self, archive: Archive, kept: Sequence[str], plain: Plain, values: Sequence[ChunkValues], chunks: Sequence[Chunk]) -> None:
        self._archive = archive
        self._values = values
        self._found = {kind.mark: self._of_mark(kept, kind.mark, plain.get(kind.mark, {})) for kind in values}
        cuts = sources([_span(chunk) for chunk in chunks], map(Span.parse, kept))
        self.uneven: list[str] = []
        self._recipes: list[list[dict[str, Recipe]]] = []
        for kind in values:
            reslicing = Reslicing(self._found[kind.mark], partial(self._scalar, kind.mark))
            self._recipes.append([reslicing.recipes(_span(chunk), cuts[_span(chunk)]) for chunk in chunks])
            self.uneven += reslicing.uneven

    def _of_mark(self, kept: Sequence[str], mark: str, plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Entry | Any]]:
        found: dict[str, dict[str, Entry | Any]] = {name: dict(plain.get(name, {})) for name in kept}
        for name, entry in self._archive.manifest.tensors.items():
            chunk, bracket, key = name.rpartition("]")
            if bracket and key.startswith(mark) and chunk + bracket in found:
                found[chunk + bracket][key.removeprefix(mark)] = entry
        return found

    def put(self) -> None:
        """Read and place everything, chunk by chunk."""
        for kind, recipes in zip(self._values, self._recipes, strict=True):
            for number, of_chunk in enumerate(recipes):
                kind.put(number, {key: self._made(kind.mark, key, recipe) for key, recipe in of_chunk.items()})

    def _made(self, mark: str, key: str, recipe: Recipe) -> Any:
        if isinstance(recipe, str):
            value = self._found[mark][recipe][key]
            return self._archive.read(recipe + mark + key) if isinstance(value, Entry) else value
        return torch.cat([self._archive.read(cut.source + mark + key, (cut.start, cut.stop)) for cut in recipe])

    def _scalar(self, mark: str, chunk: str, key: str) -> float:
        return self._archive.read(chunk + mark + key).item()


def _span(chunk: Chunk) -> Span:
    return Span(chunk.param, chunk.start, chunk.stop)


def groups_of(optimizer: Optimizer, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """The settings of every parameter group, and its chunks by name."""
    names = {id(chunk.leaf): chunk.name for chunk in chunks}
    return [
        {
            "chunks": [names[id(p)] for p in group["params"] if id(p) in names],
            "settings": {key: value for key, value in group.items() if key not in ("params", "param_names")},
        }
        for group in optimizer.param_groups
    ]


def check_groups(kept: Sequence[Mapping[str, Any]], optimizer: Optimizer, chunks: Sequence[Chunk]) -> None:
    """Raise `CheckpointError` unless every group holds the parameters that the group in its place held."""
    here = groups_of(optimizer, chunks)
    if len(here) != len(kept):
        raise CheckpointError(f"the checkpoint has {len(kept)} parameter groups, this {type(optimizer).__name__} has {len(here)}")
    for number, (group, other) in enumerate(zip(here, kept, strict=True)):
        try:
            sources([Span.parse(name) for name in group["chunks"]], map(Span.parse, other["chunks"]))
        except CheckpointError as error:
            raise CheckpointError(f"parameter group {number} is another one than in the checkpoint: {error}") from None


def restore_groups(kept: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    """Give every group its settings; a tensor (a learning rate on the device) keeps its place, others may refer to it."""
    for group, other in zip(optimizer.param_groups, kept, strict=True):
        for key, value in other["settings"].items():
            if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


def to_bytes(plain: Mapping[str, Any]) -> bytes:
    """Values as a file that loads without running code. Raises `TypeError` naming what does not."""
    whole = io.BytesIO()
    for name, value in plain.items():
        part = io.BytesIO()
        try:
            torch.save(value, part)
            torch.load(io.BytesIO(part.getvalue()), weights_only=True)
        except Exception as error:
            raise TypeError(
                f"{name} cannot be kept: it holds more than tensors, numbers, texts, lists and dicts ({type(value).__name__}); "
                f"{str(error).splitlines()[0]}"
            ) from error
    torch.save(dict(plain), whole)
    return whole.getvalue()
