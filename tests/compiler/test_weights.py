"""Weights that can move are those one segment alone reads; the problem counts them, and chunks of shared ones stay."""

import pytest
import torch
from torch import nn

import chunkft_compile
from chunkft_compile.capture import capture
from chunkft_compile.lowering import Lowering
from chunkft_compile.segments import cut
from chunkft_compile.weights import BUFFER_NBYTES, Weights
from tests.models import llama, token_batch


def _weights(model: nn.Module, *args: torch.Tensor, **batch: torch.Tensor) -> Weights:
    found = capture(model.train(), args, batch)
    return Weights(Lowering(found, cut(found)))


def _nbytes(model: nn.Module, name: str) -> int:
    parameter = model.get_parameter(name)
    return parameter.numel() * parameter.element_size()


def test_every_block_has_its_own_weights() -> None:
    model = llama()
    weights = _weights(model, **token_batch())
    assert set(weights.segment_of) == {name for name, _ in model.named_parameters()}
    block = sum(_nbytes(model, name) for name, _ in model.named_parameters() if ".layers.0." in name)
    assert [weights.nbytes(s) for s in range(4)] == [
        _nbytes(model, "model.embed_tokens.weight"),
        block,
        block,
        _nbytes(model, "model.norm.weight") + _nbytes(model, "lm_head.weight"),
    ]


def test_a_tied_weight_stays() -> None:
    model = llama(tied=True)
    weights = _weights(model, **token_batch())
    assert "model.embed_tokens.weight" not in weights.segment_of
    assert weights.nbytes(0) == 0
    assert weights.nbytes(3) == _nbytes(model, "model.norm.weight")


class Buffered(nn.Module):
    """A big constant, a small one, running statistics, and two parameters in one storage."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(16, 8)
        self.first, self.second = nn.Parameter(both[:8]), nn.Parameter(both[8:])
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("big", torch.randn(BUFFER_NBYTES // 4 // 8, 8))
        self.register_buffer("small", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x @ self.first + self.get_buffer("small")) @ self.second + self.get_buffer("big").sum(0)
        return y.sum()


def test_big_buffers_move_and_what_is_written_to_stays() -> None:
    weights = _weights(Buffered(), torch.randn(4, 8))
    assert "big" in weights.segment_of
    assert not {"small", "norm.running_mean", "norm.running_var"} & set(weights.segment_of)


def test_weights_in_one_storage_stay() -> None:
    weights = _weights(Buffered(), torch.randn(4, 8))
    assert not {"first", "second"} & set(weights.segment_of)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_problem_says_what_moves(tied: bool) -> None:
    torch.manual_seed(0)
    model = chunkft_compile.compile(llama(tied=tied), budget="1GB", solve_seconds=1.0)
    model.plan(**token_batch())
    problem = model.problem
    assert problem is not None
    moving = [sum(chunk.weight_nbytes for chunk in problem.chunks if chunk.segment == s) for s in range(len(problem.segments))]
    assert moving == [segment.weight_nbytes for segment in problem.segments]
    still = [chunk.name for chunk in problem.chunks if not chunk.weight_nbytes]
    assert all(name.startswith("model.embed_tokens.weight") for name in still)
    assert bool(still) is tied
    assert all(chunk.update_us > 0 for chunk in problem.chunks)
