"""Equal blocks are traced once: the graph is that of a full capture, and where blocks are not equal, all of them are traced."""

import functools
import logging
import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import nn

from benchmarks.zoo import ZOO, Entry
from benchmarks.zoo.trial import attempt
from chunkft_compile import fakes, likeness
from chunkft_compile.capture import Capture, capture
from chunkft_compile.errors import CaptureError
from chunkft_compile.shallow import capture_shallow
from chunkft_compile.stacks import find_stack
from tests.compiler.graphs import first_difference
from tests.models import bert_config, gpt2, llama, token_batch
from tests.support.allocator import allocator_or_skip

DEPTH, WIDTH = 7, 6


class _Doubled(torch.autograd.Function):
    """A backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Twice `x`."""
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Twice the gradient."""
        return 2 * grads[0]


def _cached_table() -> Callable[[int], torch.Tensor]:
    @functools.lru_cache
    def table(width: int) -> torch.Tensor:
        return torch.arange(width) / width

    return table


def _kept_table() -> Callable[[int], torch.Tensor]:
    tables: dict[int, tuple[torch.Tensor, int]] = {}

    def table(width: int) -> torch.Tensor:
        if width not in tables:
            tables[width] = torch.arange(width) / width, width
        return tables[width][0]

    return table


class Block(nn.Module):
    """Norm, layer, dropout; `what` is done besides."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__()
        self.index, self.what = index, what
        self.norm, self.layer, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, common: torch.Tensor | None = None) -> torch.Tensor:
        """A residual block."""
        y = torch.tanh(self.layer(self.norm(x)))
        if self.what == "scale by depth":
            y = y / (1 + self.index)
        if self.what == "another operator" and self.index == 5:
            y = y.relu()
        if self.what == "constant by depth":
            y = y * torch.tensor(float(self.index))
        if self.what == "equal constants":
            y = y * torch.tensor(0.5)
        if self.what == "count calls":
            self.calls.add_(1)
        if self.what == "own backward":
            y = _Doubled.apply(y)  # type: ignore[no-untyped-call]
        if self.what == "no gradient" and self.index == 4:
            with torch.no_grad():
                y = y * 2
        if common is not None:
            y = y * common
        if self.what == "a row more":
            x, y = torch.cat([x, x[:1]]), torch.cat([y, y[1:2]])
        result: torch.Tensor = x + self.drop(y)
        return result


class Tower(nn.Module):
    """`DEPTH` blocks between two layers; `what` is done besides, by the model or its blocks."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        blocks = [Block(i, what) for i in range(DEPTH)]
        self.table = {"cached table": _cached_table, "kept table": _kept_table}.get(what, lambda: None)()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        blocks[4].layer.weight.requires_grad_(what != "frozen weight")
        if what == "shared weight":
            blocks[5].layer.weight = blocks[2].layer.weight
        if what == "shared block":
            blocks[5] = blocks[2]
        if what == "another layer":
            blocks[5].layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.first, self.blocks = [blocks[0]], nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> Any:
        """A scalar, and perhaps more."""
        x = self.enter(x)
        seen, what = [x], self.what
        common = torch.sigmoid(self.gain) if what == "common value" else None
        for index, block in enumerate(self.blocks):
            if what == "skip":
                x = x + seen[max(0, index - 1)]
            if what == "layer 5" and index == 5:
                x = x * 2
            if what == "layer drop" and random.random() < 0.0:
                continue
            if what == "weight of the first":
                x = x * self.first[0].norm.weight
            x = block.forward(x) if what == "calls forward" else block(x, common)
            seen.append(x)
            if what == "early exit" and index == 5:
                break
        if what == "second loop":
            for block in self.blocks:
                x = block(x)
        if what == "jump":
            x = x + seen[4]
        if what == "head by depth":
            x = x / len(self.blocks)
        if self.table is not None:
            x = x + self.table(WIDTH)
        loss = self.leave(x * self.gain).square().mean()
        return (loss, *seen) if what == "hidden states" else loss


def _capture(model: nn.Module) -> Capture:
    return capture_shallow(model, (torch.zeros(2, WIDTH),), {})


COPIED = {"": 3, "common value": 2, "equal constants": 3, "cached table": 3, "kept table": 3}


@pytest.mark.parametrize("what", COPIED)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*changes Python state:UserWarning")
def test_the_graph_is_that_of_a_full_capture(what: str) -> None:
    model = Tower(what).train()
    names = [name for name, _ in model.named_modules()]
    found = _capture(model)
    assert found.copied == COPIED[what]
    assert first_difference(capture(model, (torch.zeros(2, WIDTH),), {}), found) == ""
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert type(model(torch.zeros(2, WIDTH))) is torch.Tensor  # no fake tensor was left in a cache


UNLIKE = {
    "scale by depth": "block 2 does not do the same",
    "constant by depth": "block 2 does not do the same",
    "another operator": "block 5 does not do the same",
    "no gradient": "block 4 does not do the same",
    "a row more": "block 2 does not do the same",
    "count calls": "blocks change their buffers",
    "own backward": "has a backward of its own",
    "skip": "is called between block",
    "layer 5": "is called between block",
    "weight of the first": "norm.weight of block 0 is used outside",
    "jump": "beyond the next",
    "hidden states": "beyond the next",
    "early exit": "is called between block 5 and the next",
    "calls forward": "norm.weight of block 0 is used outside",
    "second loop": "block 0 runs where block 7 should",
    "head by depth": "depends on their number",
    "frozen weight": "no stack",
    "another mode": "no stack",
    "another layer": "no stack",
    "shared weight": "no stack",
    "shared block": "no stack",
}


@pytest.mark.parametrize("what", UNLIKE)
def test_all_blocks_are_traced_where_they_are_not_equal(what: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="chunkft_compile.shallow")
    model = Tower(what).train()
    model.blocks[4].train(what != "another mode")
    assert _capture(model).copied == 0
    assert UNLIKE[what] in caplog.text


@pytest.mark.parametrize("what", [*COPIED, *(what for what, why in UNLIKE.items() if why != "no stack")])
def test_what_need_not_be_asked_is_as_if_asked(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """See the note in `likeness`: the same rows, or the same doubt, where every call is made on fake tensors."""
    called = Mock(wraps=fakes.call)
    monkeypatch.setattr(fakes, "call", called)
    quick = _rows(what)
    asked = Mock(side_effect=lambda *arguments: arguments[-1]())
    monkeypatch.setattr(fakes, "call", asked)
    monkeypatch.setattr(likeness, "how_made", lambda *_: None)
    assert quick == _rows(what)
    assert (called.call_count < asked.call_count) == (what not in ("a row more", "calls forward", "skip", "weight of the first"))


def _rows(what: str) -> object:
    model = Tower(what).train()
    stack = find_stack(model)
    assert stack is not None
    try:
        run = likeness._record(model, lambda copied: copied, stack, [torch.zeros(2, WIDTH)], DEPTH)
    except likeness._Doubt as doubt:
        return re.sub(" at 0x[0-9a-f]+", "", str(doubt))
    return run.parts, run.outputs


def test_a_random_choice_in_python_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="chunkft_compile.shallow")
    with pytest.raises(CaptureError, match="random"):
        _capture(Tower("layer drop").train())
    assert "random numbers in Python" in caplog.text


def test_the_longest_stack_of_equal_blocks_is_found() -> None:
    tower = Tower()
    model = nn.ModuleDict({"few": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), "tower": tower})
    found = find_stack(model)
    assert found is not None
    assert (found.path, found.depth) == ("tower.blocks", DEPTH)
    assert found.block_of("tower.blocks.3.norm.weight") == (3, "norm.weight")
    assert found.block_of("tower.blocks.3") == (3, "")
    assert found.block_of("tower.enter.weight") == (None, "tower.enter.weight")
    with suppress(KeyError), found.shortened(4):
        assert len(tower.blocks) == 4
        model.pop("nothing")
    assert len(tower.blocks) == DEPTH


def _deep_gemma() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, num_hidden_layers=6, vocab_size=48, sliding_window=5))


def _deep_bert() -> nn.Module:
    return transformers.BertForMaskedLM(bert_config(num_hidden_layers=6, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Llama": (lambda: llama(num_hidden_layers=6), 2),
    "GPT-2": (lambda: gpt2(n_layer=6, dropout=0.1), 2),
    "BERT": (_deep_bert, 2),
    "Gemma-3": (_deep_gemma, 0),  # its last layer has no window
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "Llama" else pytest.mark.slow) for name in MODELS])
def test_graphs_of_transformers(name: str) -> None:
    build, copied = MODELS[name]
    model, batch = build().train(), token_batch() | ({} if name == "BERT" else {"use_cache": False})
    found = capture_shallow(model, (), batch)
    assert found.copied == copied
    assert first_difference(capture(model, (), batch), found) == ""


@pytest.mark.slow
def test_all_hidden_states_are_given() -> None:
    """With outputs="all" they are outputs, so every block is traced; else they are not kept, and blocks are equal."""
    model, batch = llama(num_hidden_layers=6).train(), token_batch() | {"use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        model(**batch)  # transformers then hooks its blocks
    assert capture_shallow(model, (), batch).copied == 2
    found = capture_shallow(model, (), batch, loss_only=False)
    assert found.copied == 0
    assert len(found.outputs) == 2 + 7


@pytest.mark.parametrize("what", ["", pytest.param("common value", marks=pytest.mark.slow)])
def test_it_trains_to_the_gradients_of_autograd(what: str) -> None:
    def build() -> nn.Module:
        return Tower(what)

    def batch() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(4, WIDTH)}

    entry = Entry("tower", "", build, batch, lambda output: output)
    assert capture_shallow(entry.model(), (), entry.inputs()).copied > 0
    outcome = attempt(entry, allocator_or_skip())
    assert outcome.works, outcome


def test_a_wrong_graph_is_seen() -> None:
    """The comparison itself: a capture differs from that of a model with another operator in one block."""
    one, other = Tower().train(), Tower("another operator").train()
    assert first_difference(_capture(one), _capture(other)) != ""


def test_the_zoo_is_not_deep() -> None:
    """Its models have too few blocks for any to be repeated: here is where that is tested."""
    assert find_stack(next(entry for entry in ZOO if entry.name == "Llama").model()) is None
