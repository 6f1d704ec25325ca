"""Where regions are found, and why not elsewhere."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from chunkft_compile.capture import capture
from chunkft_compile.lowering import OPTIONS, Lowering
from chunkft_compile.segments import cut, is_forward
from chunkft_compile.tiling import Region, UntiledError, find_region, fit_tiles, tile_ranges
from tests import models
from tests.compiler.joint import captured, demands, lowered

WIDTH = 40
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Scorer(nn.Module):
    """Logits for `WIDTH` classes and any loss on them."""

    def __init__(self, loss: Loss, *, hidden: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(3, hidden)
        self.leave = nn.Linear(hidden, WIDTH)
        self.loss = loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.leave(torch.tanh(self.enter(x))), labels)


def _region(loss: Loss, *, hidden: int = 4) -> Region:
    batch = torch.randn(2, 8, 3), torch.randint(WIDTH, (2, 8))
    (segment,) = cut(capture(Scorer(loss, hidden=hidden), batch, {}))[-1:]
    return find_region(segment)


def _reason(loss: Loss, *, hidden: int = 4) -> str:
    with pytest.raises(UntiledError) as caught:
        _region(loss, hidden=hidden)
    return str(caught.value)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The plain one."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt2-tied", "bert-tied"])
def test_language_models_have_a_region_in_the_last_segment(name: str) -> None:
    lowering = lowered(name)
    *others, head = lowering.segments
    region = find_region(head)
    assert region.tokens == 2 * models.TOKENS
    assert not [segment for segment in others if lowering.untiled(segment) is None]
    large = {node for node in head.nodes if _has_logits_size(node.meta["val"])}
    assert large
    assert large <= region.inner
    assert not region.exits & large


def _has_logits_size(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 2 * models.TOKENS * models.VOCABULARY


def test_exits_are_the_loss_its_weight_and_the_gradients() -> None:
    region = find_region(cut(captured("llama"))[-1])
    forward = [node for node in region.exits if is_forward(node)]
    assert [node.meta["val"].shape for node in forward] == [(), ()]
    backward = {tuple(node.meta["val"].shape): region.steps[node].result for node in region.exits - set(forward)}
    assert set(backward) == {(models.VOCABULARY, 16), (2 * models.TOKENS, 16)}
    assert backward[models.VOCABULARY, 16] is None  # a sum over tokens
    assert backward[2 * models.TOKENS, 16] is not None


@pytest.mark.parametrize("name", ["mlp", "sequential", "normed", "shared", "bert"])
def test_other_models_have_no_tiled_option(name: str) -> None:
    lowering = lowered(name)
    for segment in lowering.segments:
        assert lowering.untiled(segment)
        assert lowering.options(segment) == OPTIONS
        assert not lowering.has_option(segment, "tiled 2")


def test_short_batches_are_offered_no_tiles() -> None:
    lowering = lowered("llama")  # 20 tokens: two tiles would have 10
    head = lowering.segments[-1]
    assert lowering.options(head) == OPTIONS
    assert lowering.has_option(head, "tiled 2")


def test_reductions_of_the_logits_stay_in_the_tiles() -> None:
    def with_z_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, -2)
        return cross_entropy(logits, labels) + 1e-3 * torch.logsumexp(flat, -1).pow(2).mean()

    region = _region(with_z_loss)
    assert [node for node in region.exits if node.target is torch.ops.aten.logsumexp.default]


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda logits, labels: logits.square().mean(), "there is no cross entropy"),
        (lambda logits, labels: cross_entropy(logits, labels) + logits.cumsum(-1).mean(), "cumsum.* whole, and has no rule for tiles"),
        (lambda logits, labels: cross_entropy(logits[:, :-1], labels[:, 1:]), "no matrix product|has no rule"),
        (lambda logits, labels: cross_entropy(logits - logits.mean((0, 1)), labels), "mean.* whole, and has no rule for tiles"),
        (
            lambda logits, labels: cross_entropy((flat := logits.flatten(0, 1)) - flat.sum(0), labels),
            "sub.* reads sum.*, which needs all tokens first",
        ),
        (lambda logits, labels: cross_entropy(torch.softmax(logits, 0), labels), "softmax.* whole, and has no rule for tiles"),
        (lambda logits, labels: cross_entropy(logits @ logits.new_ones(WIDTH, WIDTH), labels), "is not larger than the hidden size"),
    ],
)
def test_a_refusal_says_why(loss: Loss, reason: str) -> None:
    assert re.search(reason, found := _reason(loss)), found


def test_a_small_vocabulary_is_refused() -> None:
    assert "(40) is not larger than the hidden size (64)" in _reason(cross_entropy, hidden=64)


def test_options_that_do_not_exist_are_named() -> None:
    lowering = lowered("llama")
    prelude, *_, head = lowering.segments
    for option in ("tiled", "tiled 0", "tiled -2", "tiled x", "everything"):
        with pytest.raises(ValueError, match=f"unknown option '{option}': there are save, cheap, inputs"):
            lowering.tiling(head, option)
    with pytest.raises(ValueError, match=r"prelude has no option 'tiled 2': there is no cross entropy; way out: one of save"):
        lowering.backward(prelude, demands(lowering, prelude), "tiled 2")


def test_segments_of_one_kind_have_regions_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Scorer(cross_entropy) for _ in range(2))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            first, second = self.layers
            loss: torch.Tensor = first(x, labels) + second(x, labels)
            return loss

    found = capture(Twice(), (torch.randn(2, 8, 3), torch.randint(WIDTH, (2, 8))), {})
    lowering = Lowering(found, cut(found))
    regions = [lowering.tiling(segment, "tiled 2")[0] for segment in lowering.segments if lowering.untiled(segment) is None]
    assert all(regions)
    assert len(regions) == len(set(regions))


def test_ranges_cover_all_tokens_once() -> None:
    assert list(tile_ranges(20, 3)) == [(0, 7), (7, 7), (14, 6)]
    assert list(tile_ranges(5, 4)) == [(0, 2), (2, 2), (4, 1)]  # three are enough
    assert list(tile_ranges(3, 1)) == [(0, 3)]
    for tokens in range(1, 40):
        for count in range(1, 45):
            covered = [token for start, length in tile_ranges(tokens, count) for token in range(start, start + length)]
            assert covered == list(range(tokens))
            assert len(list(tile_ranges(tokens, count))) <= count


@pytest.mark.parametrize(("longest", "most"), [(16, 2), (16, 32), (19, 4), (64, 8), (10, 8)])
def test_tiles_for_fewer_tokens_are_no_longer_and_no_more(longest: int, most: int) -> None:
    refused = 0
    for tokens in range(4, longest * most + 1):
        found = fit_tiles(tokens, longest, most)
        if found is None:
            refused += 1
            continue
        assert (found.count - 1) * found.length + found.rest == tokens
        assert 1 <= found.count <= most
        assert 2 <= found.rest <= longest
        assert found.count == 1 or 2 <= found.length <= longest
    assert refused <= longest * most // 100
