"""Optimizers that cannot train chunks are refused, with the chunk or shape, the reason and the way out."""

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import split_parameters
from chunkft_compile.runtime.optimizers import measure_optimizer
from chunkft_compile.runtime.supported import refuse_unsupported

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (optim.LBFGS, "LBFGS cannot step a chunk of shape .*closure"),
        (optim.SparseAdam, "SparseAdam cannot step a chunk of shape .*does not support dense gradients"),
        (partial(optim.AdamW, capturable=True), "AdamW cannot step a chunk .* on cpu: If capturable=True, params .* supported devices"),
        (partial(optim.AdamW, differentiable=True), "AdamW cannot step a chunk .* leaf Variable that requires grad"),
        (partial(optim.SGD, lr=0.1, differentiable=True), "SGD cannot step a chunk .* leaf Variable that requires grad"),
    ],
)
def test_a_step_that_is_impossible_is_refused_when_a_plan_is_made(
    make: Callable[[Iterable[nn.Parameter]], Optimizer], message: str
) -> None:
    with pytest.raises(TypeError, match=f"(?s){message}.*Way out"):
        measure_optimizer(make([nn.Parameter(torch.zeros(3))]), [((4, 6), torch.float32)], CPU)


def test_muon_trains_whole_matrices_only() -> None:
    model = nn.Linear(4, 8, bias=False)
    whole, parts = split_parameters(model, 8 * 4 * 4), split_parameters(model, 4 * 4 * 4)
    refuse_unsupported(optim.Muon([chunk.leaf for chunk in whole]), whole)
    with pytest.raises(TypeError, match=r"Muon orthogonalises whole matrices, and weight\[0:4\] is a part of one of 8 rows\. Way out"):
        refuse_unsupported(optim.Muon([chunk.leaf for chunk in parts]), parts)
    refuse_unsupported(optim.SGD([chunk.leaf for chunk in parts], lr=0.1), parts)


class _Copying(optim.SGD):
    """Makes its weights contiguous, as bitsandbytes does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for leaf in group["params"]:
                leaf.data = leaf.data.contiguous()


def test_an_optimizer_that_would_train_a_copy_is_refused() -> None:
    model = nn.Linear(4, 4, bias=False)
    chunks = split_parameters(model, 2**20)
    refuse_unsupported(_Copying([chunks[0].leaf]), chunks)
    model.weight.data = model.weight.data.t()
    chunks = split_parameters(model, 2**20)
    refuse_unsupported(optim.SGD([chunks[0].leaf]), chunks)
    with pytest.raises(TypeError, match=r"_Copying copies weights .* a copy of weight\[0:4\]\. Way out"):
        refuse_unsupported(_Copying([chunks[0].leaf]), chunks)


@pytest.mark.parametrize("by_module", [False, True])
def test_settings_of_single_parameters_are_refused(by_module: bool) -> None:
    model = nn.Embedding(6, 4)
    chunks = split_parameters(model, 2**20)
    optimizer: Any = optim.SGD([chunk.leaf for chunk in chunks])
    optimizer.mng = SimpleNamespace(pid2config={}, module_weight_config_triple=[])
    refuse_unsupported(optimizer, chunks)
    if by_module:
        optimizer.mng.module_weight_config_triple.append((model, "weight", {"optim_bits": 32}))
    else:
        optimizer.mng.pid2config[id(chunks[0].leaf)] = {"optim_bits": 32}
    with pytest.raises(TypeError, match=r"overrides \{'optim_bits': 32\} for weight, .*Way out"):
        refuse_unsupported(optimizer, chunks)


def test_the_dearest_group_counts_and_learning_rates_do_not() -> None:
    leaves = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": [leaves[0]]}, {"params": [leaves[1]], "momentum": 0.9}, {"params": [leaves[2]], "lr": 1e-3}]
    plain, heavy, slow = groups
    layout = (40, 50), torch.float32
    cost = measure_optimizer(optim.SGD([plain, slow], lr=0.1), [layout], CPU)
    assert (cost.name, cost.of_layout[layout].state_nbytes) == ("SGD", 0)
    assert measure_optimizer(optim.SGD([plain, heavy], lr=0.1), [layout], CPU).of_layout[layout].state_nbytes == 40 * 50 * 4
