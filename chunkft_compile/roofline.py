"""What operators cost on a device that is not here: time by the roofline, temporaries by rule. Nothing is run.

The same interface as `costs.OperatorCosts`, for any lowered graph. FLOPs come from torch's own formulas (`torch.utils.flop_counter`)
on fake values, bytes from what a call reads and writes. The formula and the efficiencies are in `planner/devices.py`; how far
it is from measured times on a CPU is printed by `benchmarks/roofline.py` and written down in docs/log.md.
"""

import math
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from chunkft_compile.costs import makes_bytes, signature
from chunkft_compile.planner.devices import Device
from chunkft_compile.temporaries import accelerator_nbytes, cpu_nbytes, operator_name

_aten = torch.ops.aten
# torch 2.13 has no formula for the CPU's attention, whose first arguments are those of the CUDA one
_SAME_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}

# A view is no kernel. On an accelerator its dispatch hides behind kernels that run; on a CPU it is paid.
_VIEW_US = 1

_GATHERS = {"embedding", "index", "gather", "index_select"}  # read as many rows as they give, not the table
_SCATTERS = {"embedding_dense_backward", "index_put", "slice_backward", "select_backward", "scatter_add", "index_add", "scatter"}
# Rows too long for registers are read once for the maximum, once for the sum and once more for the result.
_READS = {"_softmax": 3, "_log_softmax": 3, "_softmax_backward_data": 2, "_log_softmax_backward_data": 2}


class RooflineCosts:
    """A table of computed calls on one device, filled when asked.

    With `tf32`, float32 products use TF32, as after `torch.set_float32_matmul_precision("high")`. `unknown` are operators without a
    rule for their temporaries, which are then taken to be as large as their results.
    """

    def __init__(self, device: Device, *, tf32: bool = False) -> None:
        self.device = device
        self.unknown: set[str] = set()
        self._float32 = "tf32" if tf32 else "float32"
        self._table: dict[object, tuple[int, int]] = {}
        self._graph_us: dict[fx.Graph, int] = {}

    def measure(self, graphs: Iterable[fx.Graph]) -> None:
        """Compute every call of `graphs` that is not in the table yet."""
        for graph in graphs:
            for node in graph.nodes:
                if makes_bytes(node):
                    self._figures(node)

    def temporary_nbytes(self, node: fx.Node) -> int:
        """Most bytes inside the call beyond its results."""
        return self._figures(node)[1] if makes_bytes(node) else 0

    def us(self, node: fx.Node) -> int:
        """Microseconds of the call."""
        if node.op != "call_function" or node.target is operator.getitem:
            return 0
        return self._figures(node)[0] if makes_bytes(node) else _VIEW_US

    def graph_us(self, graph: fx.Graph) -> int:
        """Microseconds of all calls of a graph."""
        if graph not in self._graph_us:
            self._graph_us[graph] = sum(self.us(node) for node in graph.nodes)
        return self._graph_us[graph]

    def _figures(self, node: fx.Node) -> tuple[int, int]:
        """Microseconds and temporary bytes of a call that makes bytes."""
        key = signature(node)
        if key not in self._table:
            attention = "attention" in operator_name(node)
            us = self.device.us(flops(node), traffic_nbytes(node), self._precision(node), attention=attention)
            self._table[key] = (max(1, round(us)), self._temporary_nbytes(node))
        return self._table[key]

    def _temporary_nbytes(self, node: fx.Node) -> int:
        if not self.device.accelerator:
            return cpu_nbytes(node)
        nbytes = accelerator_nbytes(node)
        if nbytes is None:
            self.unknown.add(operator_name(node))
            return sum(self.device.allocated_nbytes(_nbytes(tensor)) for tensor in _tensors(node))
        return self.device.allocated_nbytes(nbytes)

    def _precision(self, node: fx.Node) -> str:
        """Which peak bounds the arithmetic of a call."""
        dtypes = [tensor.dtype for source in node.all_input_nodes for tensor in _tensors(source) if tensor.dtype.is_floating_point]
        dtype = dtypes[0] if dtypes else torch.float32
        if dtype in (torch.bfloat16, torch.float16):
            return "bfloat16"
        if dtype is torch.float32 or not flops(node):
            return self._float32
        raise ValueError(f"no peak is known for {operator_name(node)} in {dtype} ({node.name}); load the model in bfloat16 or float32")


def flops(node: fx.Node) -> int:
    """Multiplications and additions of matrix products, convolutions and attention; 0 for every other call."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    packet = target.overloadpacket
    if operator_name(node) != packet.__name__:  # in place; the formulas know the operator that makes a result
        packet = getattr(_aten, operator_name(node), packet)
    count = flop_registry.get(_SAME_FLOPS.get(packet, packet))
    if count is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"]))


def traffic_nbytes(node: fx.Node) -> int:
    """Bytes that a call reads from and writes to the device's memory: each element of an argument once per pass, results once."""
    name = operator_name(node)
    written = sum(_nbytes(tensor) for tensor in _tensors(node))
    arguments = [_nbytes(tensor) for source in node.all_input_nodes for tensor in _tensors(source)]
    if name == "copy" and len(arguments) > 1:  # what is overwritten is not read
        return written + arguments[1]
    if name in _GATHERS:
        return 2 * written + sum(arguments[1:])
    if name in _SCATTERS:
        return written + 2 * min(arguments)
    return written + sum(arguments) * _READS.get(name, 1)


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension is one."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return int(math.prod(sizes)) * tensor.element_size()
