"""Token rules on single calls: where the tokens are afterwards, and where a rule declines."""

from typing import Any

import pytest
import torch
from torch import fx

from chunkft_compile.tokens import Step, Tokens, step_of

aten = torch.ops.aten
TOKENS = 6  # 2 x 3
VALUES = {
    "flat": (6, 5),
    "deep": (2, 3, 5),
    "other": (6, 5),
    "per_token": (6, 1),
    "row": (5,),
    "one_batch": (3, 5),
    "wide": (5, 7),
    "tall": (6, 4),
}


def _step(target: Any, *names: Any, tiled: dict[str, Tokens]) -> tuple[Step | None, dict[str, fx.Node]]:
    """The step of `target(*names)`; names of `VALUES` are values."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in VALUES}
    for name, node in nodes.items():
        node.meta["val"] = torch.empty(VALUES[name])
    args = [nodes[name] if isinstance(name, str) else name for name in names]
    call = graph.call_function(target, tuple(args))
    call.meta["val"] = target(*[arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args])
    return step_of(call, {nodes[name]: at for name, at in tiled.items()}, TOKENS), nodes


FLAT, DEEP = {"flat": Tokens(0)}, {"deep": Tokens(0, 2)}
KEPT = [
    (aten.tanh.default, ("flat",), FLAT, Tokens(0)),
    (aten.mul.Tensor, ("flat", "row"), FLAT, Tokens(0)),
    (aten.mul.Tensor, ("deep", "row"), DEEP, Tokens(0, 2)),
    (aten.view.default, ("flat", [2, 3, 5]), FLAT, Tokens(0, 2)),
    (aten.view.default, ("deep", [6, 5]), DEEP, Tokens(0)),
    (aten.view.default, ("flat", [1, 6, 5]), FLAT, Tokens(0, 2)),
    (aten.t.default, ("flat",), FLAT, Tokens(1)),
    (aten.mm.default, ("flat", "wide"), FLAT, Tokens(0)),
    (aten._log_softmax.default, ("deep", -1, False), DEEP, Tokens(0, 2)),
    (aten.sum.dim_IntList, ("flat", [1]), FLAT, Tokens(0)),
    (aten.amax.default, ("deep", [2], True), DEEP, Tokens(0, 2)),
    (aten.sum.dim_IntList, ("flat", [0]), FLAT, None),
    (aten.sum.dim_IntList, ("deep", [0, 1]), DEEP, None),
    (aten.sum.dim_IntList, ("deep", []), DEEP, None),
]
DECLINED = [
    (aten.cumsum.default, ("flat", 0), FLAT),
    (aten.add.Tensor, ("deep", "one_batch"), DEEP),  # has some of the token dimensions
    (aten.view.default, ("flat", [3, 10]), FLAT),
    (aten.t.default, ("flat",), {"flat": Tokens(0, 2)}),
    (aten._log_softmax.default, ("flat", 0, False), FLAT),
    (aten.sum.dim_IntList, ("deep", [1]), DEEP),
    (aten.mean.dim, ("flat", [0]), FLAT),
    (aten.amax.default, ("flat", [0]), FLAT),
]


@pytest.mark.parametrize(("target", "names", "tiled", "result"), KEPT)
def test_tokens_are_followed(target: Any, names: tuple[Any, ...], tiled: dict[str, Tokens], result: Tokens | None) -> None:
    step, _ = _step(target, *names, tiled=tiled)
    assert step is not None
    assert step.result == result


@pytest.mark.parametrize(("target", "names", "tiled"), DECLINED)
def test_a_rule_declines(target: Any, names: tuple[Any, ...], tiled: dict[str, Tokens]) -> None:
    assert _step(target, *names, tiled=tiled)[0] is None


def test_other_operands_are_cut_where_they_have_the_tokens() -> None:
    step, nodes = _step(aten.mul.Tensor, "flat", "per_token", tiled=FLAT)
    assert step == Step(Tokens(0), {nodes["flat"]: Tokens(0), nodes["per_token"]: Tokens(0)})
    step, nodes = _step(aten.mul.Tensor, "flat", "row", tiled=FLAT)
    assert step == Step(Tokens(0), {nodes["flat"]: Tokens(0)})


def test_tokens_that_are_multiplied_away_are_summed_over() -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    left.meta["val"], right.meta["val"] = torch.empty(5, 6), torch.empty(6, 4)
    call = graph.call_function(aten.mm.default, (left, right))
    call.meta["val"] = torch.empty(5, 4)
    for tiled in ({left: Tokens(1)}, {right: Tokens(0)}, {left: Tokens(1), right: Tokens(0)}):
        assert step_of(call, tiled, TOKENS) == Step(None, {left: Tokens(1), right: Tokens(0)})
    assert step_of(call, {left: Tokens(0), right: Tokens(0)}, TOKENS) is None


def test_a_tile_has_one_dimension_for_the_tokens() -> None:
    assert Tokens(0, 2).merged((2, 3, 5), 4) == [4, 5]
    assert Tokens(1).merged((5, 6), 2) == [5, 2]
