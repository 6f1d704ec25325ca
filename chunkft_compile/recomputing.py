"""Which forward values a backward recomputes, by option: all others are saved."""

from collections.abc import Iterable

import torch
from torch import fx

from chunkft_compile.liveness import storages
from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.tiling import Region

_HEAVY = {"mm", "bmm", "addmm", "baddbmm", "convolution", "_grouped_mm", "_scaled_mm", "embedding"}


def _recomputed(node: fx.Node, option: str) -> bool:
    """Whether a backward recomputes this forward node instead of reading a saved value."""
    if option == "save" or not isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0] if node.args else None  # an item of a tuple goes with the call that made the tuple
        return option != "save" and isinstance(source, fx.Node) and source.op == "call_function" and _recomputed(source, option)
    if torch.Tag.nondeterministic_seeded in node.target.tags and not _without_dropout(node):
        return False
    name = node.target.overloadpacket.__name__
    heavy = name in _HEAVY or "attention" in name or name.endswith("_forward")
    return option == "inputs" or not heavy


def _without_dropout(node: fx.Node) -> bool:
    """Attention is tagged as random because it may drop; with probability 0 it recomputes to the same bits."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    value = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", schema.arguments[place].default_value)
    return isinstance(value, float) and value == 0.0


def inside_of(segment: Segment, option: str, region: Region | None) -> set[fx.Node]:
    """What a backward computes. With tiles: what lies in them again, but no forward exit of theirs; those are small, and saved."""
    views = _views_of_weights(segment)
    if region is None:
        return views | {node for node in segment.nodes if not is_forward(node) or _recomputed(node, option)}
    again = {node for node in segment.nodes if _recomputed(node, "cheap") and node not in region.exits}
    return again | (views - region.exits) | region.inner | {node for node in segment.nodes if not is_forward(node)}


def _views_of_weights(segment: Segment) -> set[fx.Node]:
    """Views of what is there anyway: taken again, not kept, since a weight may lie elsewhere by the time of the backward."""
    given = {storage for node in segment.externals if node.op == "placeholder" for storage in storages(node.meta["val"])}
    forward = [node for node in segment.nodes if is_forward(node) and isinstance(node.meta.get("val"), torch.Tensor)]
    return {node for node in forward if set(storages(node.meta["val"])) <= given}


def inputs_of(node: fx.Node, region: Region | None) -> list[fx.Node]:
    """Whole values that `node` is computed from."""
    return region.entries(node) if region is not None and node in region.exits else node.all_input_nodes


def needed_for(roots: Iterable[fx.Node], inside: set[fx.Node], region: Region | None) -> set[fx.Node]:
    """Nodes computed whole for `roots`; of what tiles compute, only the exits."""
    found: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in inside and node not in found:
            assert region is None or node not in region.inner or node in region.exits, f"{node} lives within tiles and is read whole"
            found.add(node)
            todo.extend(inputs_of(node, region))
    return found
