"""The largest tensors at the peak of a step, by names that a reader of the model knows."""

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from chunkft_compile.assembly import Assembled
from chunkft_compile.planner.program import Op, simulate
from chunkft_compile.runtime.chunks import allocated_nbytes


def largest_tensors(
    assembled: Assembled, model: nn.Module, temporary: Callable[[fx.Node], int], at: int | None = None, most: int = 3
) -> tuple[tuple[str, int], ...]:
    """What takes most bytes at instruction `at` (the fullest, if None): names and bytes of `most` tensors, the largest first.

    Weights and buffers are there at every moment. `temporary(node)` are the bytes an operator takes and gives back while it runs.
    """
    if at is None:
        moments = simulate(assembled.program).moments
        at = max(range(len(moments)), key=lambda number: moments[number].peak_nbytes)
    named = {t.untyped_storage()._cdata: (name, t) for name, t in (*model.named_buffers(), *model.named_parameters())}
    found = [(f"{name} {_layout(tensor)}", allocated_nbytes(tensor)) for name, tensor in named.values()]
    found += _stored(assembled, at) + _inside(assembled, at, temporary)
    return tuple(sorted(found, key=lambda pair: -pair[1])[:most])


def _stored(assembled: Assembled, at: int) -> list[tuple[str, int]]:
    """Values that earlier instructions made and that are still there."""
    program = assembled.program
    live: dict[int, int] = {}
    for instruction in program.instructions[:at]:
        for value in instruction.writes:
            if program.storage_of[value] >= 0:
                live.setdefault(program.storage_of[value], value)
        for value in instruction.frees:
            if live.get(program.storage_of[value]) == value:
                del live[program.storage_of[value]]
    return [(_name(assembled.nodes[value]), program.storage_nbytes[storage]) for storage, value in live.items()]


def _inside(assembled: Assembled, at: int, temporary: Callable[[fx.Node], int]) -> list[tuple[str, int]]:
    """Values inside the call that is at work."""
    instruction = assembled.program.instructions[at]
    if instruction.op is Op.UPDATE:
        return [("optimizer state and workspace of the chunks at work", instruction.transient_nbytes)]
    if instruction.op not in (Op.FORWARD, Op.BACKWARD):
        return []
    code = assembled.codes[instruction.code]
    return [(_name(node), nbytes) for node, nbytes in code.footprint.live_at_peak(frozenset(), temporary)]


def _name(node: fx.Node) -> str:
    """`model.layers.3.mlp, gradient of mul [2, 256, 2048] float32`."""
    forward, backward = node.meta.get("nn_module_stack"), node.meta.get("fwd_nn_module_stack")
    stack = forward or backward
    path = list(stack.values())[-1][0].removeprefix("L['self'].").removeprefix("model.") if stack else ""
    module = f"{path}: " if path else ""
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    operator = getattr(node.target, "overloadpacket", node.target)
    kind = getattr(operator, "__name__", str(operator))
    return f"{module}{'backward ' if backward and not forward else ''}{kind} {_layout(tensors[0]) if tensors else ''}".rstrip()


def _layout(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
