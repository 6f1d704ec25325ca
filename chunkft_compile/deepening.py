"""The problem of a deep model from that of a shallow one: blocks of one kind are captured three times, not eighty.

Capture takes a constant time per layer, and equal blocks say the same thing. Three of them tell all there is to know: the first
(next to the prelude), one in the middle, and the last (next to the head). A test holds the result equal to a full capture.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chunkft_compile.planner import Chunk, Problem, Segment

LAYERS = 3
_INDEX = re.compile(r"\.(\d+)\.")


def shallow_config(config: Any) -> Any | None:
    """`config` with three layers; None where layers differ in kind, or are too few for it to matter."""
    layers = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None) or []
    if layers <= LAYERS or len(set(kinds)) > 1:
        return None
    shallow = copy.deepcopy(config)
    if kinds:
        shallow.layer_types = list(kinds)[:LAYERS]
    shallow.num_hidden_layers = LAYERS
    return shallow


def is_a_stack(kinds: Sequence[object]) -> bool:
    """Whether the segments of a model of three layers are prelude, three blocks of one kind, and head, so that it can be deepened."""
    return len(kinds) == LAYERS + 2 and len(set(kinds[1:-1])) == 1


def deepen(shallow: Problem, names: list[str], layers: int, static_nbytes: int) -> Problem:
    """The problem of the model with `layers` layers.

    `names` are the names of its chunks, in order, cut by the limit of the shallow one. `static_nbytes` is what lives throughout a step
    of the deep model. Raises `ValueError` for a chunk that the shallow model does not have.
    """
    assert is_a_stack([segment.kind for segment in shallow.segments]), "only a stack of equal blocks can be deepened"
    by_name = {chunk.name: chunk for chunk in shallow.chunks}
    chunks = tuple(_chunk(by_name, name, layers) for name in names)
    return replace(shallow, static_nbytes=static_nbytes, segments=_segments(shallow.segments, layers), chunks=chunks)


def _segments(shallow: tuple[Segment, ...], layers: int) -> tuple[Segment, ...]:
    blocks = (shallow[1], *(shallow[2] for _ in range(layers - 2)), shallow[LAYERS])
    named = (replace(block, name=re.sub(r"\d+$", str(i), block.name)) for i, block in enumerate(blocks))
    return (shallow[0], *named, shallow[-1])


def _chunk(by_name: dict[str, Chunk], name: str, layers: int) -> Chunk:
    """The chunk of that name: the one of the shallow model in the first, a middle or the last block, in its own segment."""
    match = _INDEX.search(name)
    index = int(match[1]) if match else 0
    twin = 0 if index == 0 else LAYERS - 1 if index == layers - 1 else 1
    found = by_name.get(name if match is None else f"{name[: match.start(1)]}{twin}{name[match.end(1) :]}")
    if found is None:
        raise ValueError(f"{name} has no counterpart in a model of {LAYERS} layers")
    deeper = layers - LAYERS

    def place(segment: int) -> int:
        if segment == LAYERS + 1:
            return segment + deeper
        return segment + index - twin if match is not None and segment == twin + 1 else segment

    return replace(found, name=name, segment=place(found.segment), first=place(found.first))
