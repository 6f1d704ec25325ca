"""The stand-in for an applied gradient: no bytes, everything a loop asks of a gradient in passing, and no computing."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from chunkft_compile.runtime.applied import AppliedGradient, TrainingError
from tests.support.allocator import Allocator


def _leaves() -> list[nn.Parameter]:
    leaves = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.tensor(1.0))]
    for leaf in leaves:
        leaf.grad = AppliedGradient(leaf)
    return leaves


def test_it_describes_the_gradient() -> None:
    for leaf in _leaves():
        gradient = leaf.grad
        assert gradient is not None
        assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)
        assert (gradient.numel(), gradient.dim(), gradient.stride()) == (leaf.numel(), leaf.dim(), leaf.stride())
        assert not gradient.requires_grad
        assert not gradient.is_sparse
        assert gradient.grad_fn is None
        assert f"{gradient}" == f"<gradient of shape {tuple(leaf.shape)}, applied inside backward>"


def test_it_has_no_bytes(allocator: Allocator) -> None:
    leaf = nn.Parameter(torch.ones(1000))
    before = allocator.live()
    allocator.reset()
    leaf.grad = AppliedGradient(leaf)
    assert allocator.peak() == before


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_clipping_is_refused(clip: Callable[..., object], foreach: bool | None) -> None:
    with pytest.raises(TrainingError, match=r'update="immediate" has applied .* compile\(\.\.\., update="held"\)'):
        clip(_leaves(), 1.0, foreach=foreach)


def test_unscaling_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(TrainingError, match=r"non_finite_check_and_unscale_ on a gradient"):
        scaler.unscale_(torch.optim.SGD(_leaves(), lr=0.1))


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda g: g + 1, "add"),
        (lambda g: g.norm(), "norm"),
        (lambda g: g.data, "data"),
        (lambda g: g.detach(), "detach"),
        (lambda g: g.mul_(0.5), "mul_"),
        (lambda g: torch.stack([torch.ones(3, 2), g]), "stack"),
        (lambda g: bool(g), "__bool__"),
        (lambda g: g[0], "__getitem__"),
        (copy.deepcopy, "__deepcopy__"),
        (lambda g: torch.ops.aten.add.Tensor(g, 1), r"add\.Tensor"),
    ],
)
def test_computing_is_refused_by_name(compute: Callable[[torch.Tensor], object], name: str) -> None:
    gradient = _leaves()[0].grad
    assert gradient is not None
    with pytest.raises(TrainingError, match=rf"^{name} on a gradient"):
        compute(gradient)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TrainingError):
        gradient.add(1)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_goes_over_it(settings: dict[str, bool], to_none: bool) -> None:
    leaves, other = _leaves(), nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.AdamW([*leaves, other], **settings).zero_grad(set_to_none=to_none)  # type: ignore[arg-type]
    assert all((leaf.grad is None) == to_none for leaf in leaves)
    assert other.grad is None if to_none else torch.equal(other.grad, torch.zeros(2))
    module = nn.ParameterList(_leaves())
    module.zero_grad(set_to_none=to_none)
    assert all((leaf.grad is None) == to_none for leaf in module)
