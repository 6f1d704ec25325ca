"""Cutting: kinds, prelude and head, the direction in which values flow, and models that are not one stack of blocks."""

from typing import Any

import pytest
import torch
from torch import fx, nn

from chunkft_compile.capture import Capture, capture
from chunkft_compile.segments import Segment, cut, is_forward
from tests.compiler.joint import captured

CASES = ["llama", "llama-tied", "gpt2-tied", "bert", "mlp", "sequential", "normed", "shared"]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class EncoderDecoder(nn.Module):
    """Two stacks; every decoder block reads what the encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.encoder:
            x = block(x)
        for block in self.decoder:
            y = block(y + x)
        loss: torch.Tensor = self.head(y).sum()
        return loss


class Repeated(nn.Module):
    """Two blocks, the first of which runs again after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (0, 1, 0):
            x = self.blocks[index](x)
        return x.sum()


class Single(nn.Module):
    """Too small to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.only(x).sum()
        return loss


class Scalar(nn.Module):
    """No data goes in: there is no path from a batch to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self) -> torch.Tensor:
        return (self.weight * self.weight).sum()


def _captured(model: nn.Module, *args: Any) -> Capture:
    return capture(model.train(), args, {})


def check(found: Capture, segments: tuple[Segment, ...]) -> None:
    """Every call in exactly one segment; forward values flow up only, backward values down only; positions agree with nodes."""
    calls = [node for node in found.graph.nodes if node.op == "call_function"]
    members = [node for segment in segments for node in segment.nodes]
    assert sorted(map(id, members)) == sorted(map(id, calls))
    owner = {node: segment.number for segment in segments for node in segment.nodes}
    for node in calls:
        for source in node.all_input_nodes:
            if source in owner and is_forward(source):
                assert not is_forward(node) or owner[source] <= owner[node], f"{source} above {node}"
            elif source in owner:
                assert owner[source] >= owner[node], f"{source} below {node}"
    for segment in segments:
        read = {source for node in segment.nodes for source in node.all_input_nodes} - set(segment.nodes)
        assert set(segment.externals) == read
        assert all(segment.at(position) is node for node, position in segment.position.items())
        flags = [is_forward(node) for node in segment.nodes]
        assert flags == sorted(flags, reverse=True)


@pytest.mark.parametrize("name", CASES)
def test_every_call_has_one_segment_and_values_flow_one_way(name: str) -> None:
    check(captured(name), cut(captured(name)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-tied", "bert"])
def test_blocks_share_a_kind_between_prelude_and_head(name: str) -> None:
    prelude, *blocks, head = cut(captured(name))
    assert (prelude.name, head.name) == ("prelude", "head")
    assert [block.name.split()[-1] for block in blocks] == [str(i) for i in range(len(blocks))]
    assert len(blocks) >= 2
    assert len({block.kind for block in blocks}) == 1
    assert len({prelude.kind, blocks[0].kind, head.kind}) == 3


def test_positions_mean_the_same_in_all_segments_of_a_kind() -> None:
    _, *blocks, _ = cut(captured("llama"))
    for nodes in zip(*(block.nodes for block in blocks), strict=True):
        assert len({(node.target, str(node.meta["val"].shape)) for node in nodes if isinstance(node.meta["val"], torch.Tensor)}) <= 1
    for nodes in zip(*(block.externals for block in blocks), strict=True):
        assert len({node.op for node in nodes}) == 1


def test_kinds_differ_where_shapes_do() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x.sum()

    kinds = [segment.kind for segment in cut(_captured(Uneven(), torch.randn(3, 6)))]
    assert len(set(kinds)) == len(kinds)  # the first has nothing below, the others differ in shape


def test_two_stacks() -> None:
    found = _captured(EncoderDecoder(), torch.randn(3, 6), torch.randn(3, 6))
    segments = cut(found)
    check(found, segments)
    blocks = [segment.name for segment in segments if segment.name.startswith(("encoder", "decoder"))]
    assert blocks == ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "decoder 2"]


def test_a_block_used_twice_is_two_segments() -> None:
    found = _captured(Repeated(), torch.randn(3, 6))
    segments = cut(found)
    check(found, segments)
    assert [segment.name for segment in segments][:3] == ["block 0", "block 1", "block 0"]


def test_a_model_without_a_stack_is_cut_where_one_tensor_carries_everything() -> None:
    found = captured("mlp")
    weights = [sorted(found.params[node] for node in segment.externals if _is_weight(node, segment)) for segment in cut(found)]
    assert weights == [["enter.bias", "enter.weight"], ["middle.bias", "middle.weight"], ["leave.bias", "leave.weight"]]


def _is_weight(node: fx.Node, segment: Segment) -> bool:
    return node in captured("mlp").params and any(is_forward(user) for user in node.users if user in segment.position)


@pytest.mark.parametrize(("model", "args"), [(Single(), (torch.randn(3, 6),)), (Scalar(), ())], ids=["single", "no batch"])
def test_one_segment_is_the_fallback(model: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    found = _captured(model, *args)
    segments = cut(found)
    check(found, segments)
    assert len(segments) == 1
