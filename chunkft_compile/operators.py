"""Operators of our own, for gradients that torch has no operator for."""

import torch


@torch.library.custom_op("chunkft::group_products", mutates_args=())
def _group_products(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Products of the groups `first .. first + count - 1`: [tokens, in], [tokens, out] -> [count, in, out].

    Group g has the tokens `ends[g - 1] .. ends[g] - 1`. The ends are read by the host, so an accelerator is waited for once.
    """
    result = torch.zeros((count, a.shape[1], b.shape[1]), dtype=a.dtype, device=a.device)
    edges = [0, *ends.tolist()]
    for number in range(count):
        start, stop = edges[first + number], edges[first + number + 1]
        if start < stop:
            torch.mm(a[start:stop].t(), b[start:stop], out=result[number])
    return result


@_group_products.register_fake
def _(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return a.new_empty((count, a.shape[1], b.shape[1]))


group_products = torch.ops.chunkft.group_products.default
"""The operator, as graphs call it."""
