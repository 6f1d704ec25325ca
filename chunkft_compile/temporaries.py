"""Memory inside operators, by rule: for a device that is not here nothing can be run.

Read from the sources of torch 2.13, not measured: no GPU was at hand. Each rule is an upper bound with a reason. Left out: the
split-K buffers of matrix products, which live in the cuBLAS workspace that `planner/devices.py` reserves; and host memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_MIB = 2**20

_NONE = {  # one kernel from arguments to results, or a copy
    *("mm", "bmm", "addmm", "baddbmm", "dot", "mv", "linear", "_grouped_mm"),
    *("embedding", "index", "gather", "index_select", "slice_backward", "select_backward", "slice_scatter", "select_scatter"),
    *("clone", "_to_copy", "copy", "cat", "stack", "repeat", "constant_pad_nd", "roll", "flip", "tril", "triu", "as_strided_scatter"),
    *("arange", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "empty", "empty_like", "scalar_tensor", "_unsafe_view"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted", "lift_fresh_copy"),
    *(
        "_softmax",
        "_safe_softmax",
        "_log_softmax",
        "_softmax_backward_data",
        "_log_softmax_backward_data",
        "nll_loss_forward",
        "nll_loss_backward",
    ),
    *("native_layer_norm", "_fused_rms_norm", "native_dropout", "native_dropout_backward", "bernoulli", "rand", "randn", "masked_fill"),
    *("scatter", "scatter_add", "expand_copy", "view_copy", "reshape", "_reshape_alias", "unbind_copy", "split_copy", "glu"),
    *("mse_loss", "smooth_l1_loss", "soft_margin_loss", "binary_cross_entropy"),
}
_REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "any",
    "all",
    "prod",
    "argmax",
    "argmin",
    "var",
    "var_mean",
    "norm",
    "logsumexp",
}
_SORTS = {"sort", "topk", "argsort", "cumsum", "unique", "nonzero"}

# Reductions over few outputs go over several blocks, with partial sums in between: threads of all multiprocessors, some bytes each.
_PARTIAL_SUMS_NBYTES = _MIB
_FEW_INDICES = 3072  # up to here embedding_dense_backward is one kernel without a sort
_SORT_BUFFERS = 6  # keys and positions before and after, and what the radix sort itself takes


def operator_name(node: fx.Node) -> str:
    """Without namespace and overload: "mm". In place (`addmm_`) it is the same kernel, which writes over an argument: "addmm"."""
    target = node.target
    return str(target.overloadpacket.__name__).removesuffix("_") if isinstance(target, torch._ops.OpOverload) else str(target)


def accelerator_nbytes(node: fx.Node) -> int | None:
    """Temporaries of a call on a CUDA device at most; None where there is no rule."""
    name = operator_name(node)
    if name in _REDUCTIONS:
        # fp32 partial sums in registers: a bf16 argument is not copied, as it is on a CPU
        return min(_PARTIAL_SUMS_NBYTES, 4 * _numel(_argument(node, 0)))
    for part, rule in _ACCELERATOR.items():
        if part in name:
            return rule(node)
    if name in _NONE or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags):
        return 0
    return None


def _attention_backward(node: fx.Node) -> int:
    """Flash and efficient attention: fp32 row sums [B, H, S up to 128] and an fp32 gradient of the query [B, S, H, D up to 32]."""
    query = next(tensor for tensor in _tensors(node.args) if tensor.dim() == 4)  # [B, H, S, D]
    batch, heads, length, width = query.shape
    rows = batch * heads * -(-length // 128) * 128
    return 4 * rows * (1 + -(-width // 32) * 32)


def _embedding_backward(node: fx.Node) -> int:
    """Sorted indices and, per run of equal ones, a partial row in fp32."""
    gradient, indices = _argument(node, 0), _argument(node, 1)
    if _numel(indices) <= _FEW_INDICES:
        return 0
    return _SORT_BUFFERS * 8 * _numel(indices) + 4 * _numel(gradient) * 11 // 10


def _index_put(node: fx.Node) -> int:
    """Linear indices, sorted with their positions."""
    most = max((_numel(tensor) for tensor in _tensors(node.args[1])), default=0)
    return _SORT_BUFFERS * 8 * most


def _sort(node: fx.Node) -> int:
    argument = _argument(node, 0)
    return 2 * _numel(argument) * (argument.element_size() + 8)


def _norm_backward(node: fx.Node) -> int:
    """Partial gradients of weight and bias, fp32, of at most 128 row blocks."""
    gradient = _argument(node, 0)
    return 2 * 4 * 128 * int(gradient.shape[-1])


def _convolution(node: fx.Node) -> int:
    """cuDNN chooses; arguments and results in another layout are the usual workspace."""
    return sum(_numel(t) * t.element_size() for t in (*_tensors(node.args), *_tensors(node.meta["val"])))


_ACCELERATOR: dict[str, Callable[[fx.Node], int]] = {
    "attention_backward": _attention_backward,
    "attention_for_cpu_backward": _attention_backward,  # traced on a CPU, it stands for the kernels of the device
    "attention": lambda node: 0,  # its row sums are a result
    "embedding_dense_backward": _embedding_backward,
    "index_put": _index_put,
    "index_add": _index_put,
    "layer_norm_backward": _norm_backward,
    "rms_norm_backward": _norm_backward,
    "convolution": _convolution,
    **dict.fromkeys(_SORTS, _sort),
}


def cpu_nbytes(node: fx.Node) -> int:
    """Temporaries of a call on this CPU with one thread, where they are worth a rule; `OperatorCosts` knows the rest by measuring."""
    name = operator_name(node)
    low = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in _tensors(node.args))
    if name in _REDUCTIONS and low:
        return 4 * _numel(_argument(node, 0))  # an fp32 copy
    if name == "native_dropout":
        return 2 * _numel(_argument(node, 0)) * _argument(node, 0).element_size()
    if "attention_for_cpu" in name:
        query = next(tensor for tensor in _tensors(node.args) if tensor.dim() == 4)
        return 4 * _numel(query) + _MIB // 8 if "backward" in name else _MIB // 8
    if name.startswith("convolution"):
        return _convolution(node)
    if low and name in ("mm", "bmm", "addmm", "baddbmm"):
        return _MIB  # oneDNN repacks a part of its arguments
    return 0


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors among arguments (nodes stand for their fake values) or results."""
    values = fx.node.map_arg(value, lambda source: source.meta["val"])
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _argument(node: fx.Node, place: int) -> torch.Tensor:
    return _tensors(node.args)[place]


def _numel(tensor: torch.Tensor) -> int:
    return int(math.prod(tensor.shape))
