"""Passes over the joint graph keep what it computes, and make of each gradient a call of its own."""

import logging
import operator
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from chunkft_compile.capture import Capture, capture
from chunkft_compile.liveness import storages
from chunkft_compile.operators import group_products
from chunkft_compile.passes import PASSES, Pass, run_passes
from chunkft_compile.passes.copies import write_copies_anew
from chunkft_compile.runtime.meter import measure_calls

aten = torch.ops.aten


class Graph:
    """A graph of calls on inputs, with the metadata that capture gives."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.inputs = inputs
        self.nodes = [self.graph.placeholder(f"x{i}") for i in range(len(inputs))]
        for node, tensor in zip(self.nodes, inputs, strict=True):
            node.meta["val"] = self.mode.from_tensor(tensor)

    def call(self, target: Any, *args: Any, forward: bool | None = False, **kwargs: Any) -> fx.Node:
        """A call with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        made, named = fx.node.map_arg((args, kwargs), lambda source: source.meta["val"])
        with self.mode:
            node.meta["val"] = target(*made, **named)
        if forward is not None:
            node.meta["partitioner_tag"] = "is_forward" if forward else "is_backward"
        return node

    def run(self) -> Any:
        """Its result."""
        return fx.Interpreter(nn.Module(), graph=self.graph).run(*self.inputs)

    def targets(self) -> list[str]:
        """The operators, in order."""
        return [str(node.target) for node in self.graph.nodes if node.op == "call_function"]


def _apply(made: Graph, name: str) -> None:
    run_passes(made.graph, made.mode, [each for each in PASSES if each.name == name])


def test_the_bias_of_a_convolution_is_a_sum_and_its_weight_is_left_out() -> None:
    grad, source, weight = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 6, 6), torch.randn(5, 3, 3, 3)
    made = Graph(grad, source, weight)
    args = (*made.nodes, [5], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True])
    call = made.call(aten.convolution_backward.default, *args)
    made.graph.output(tuple(made.call(operator.getitem, call, i) for i in range(3)))
    before = made.run()
    _apply(made, "biases")
    assert made.targets().count("aten.sum.dim_IntList") == 1
    assert not any(user.args[1] == 2 for user in call.users)
    torch.testing.assert_close(made.run(), before)


def test_experts_have_one_call_for_each_gradient() -> None:
    from transformers.integrations import moe  # noqa: F401 (registers the operator)

    tokens, weight, ends = torch.randn(6, 3), torch.randn(4, 3, 5), torch.tensor([1, 1, 4, 6])
    made = Graph(tokens, weight, ends, torch.randn(6, 5))
    call = made.call(torch.ops.transformers.grouped_mm_fallback_backward.default, *made.nodes)
    made.graph.output(tuple(made.call(operator.getitem, call, i) for i in range(2)))
    before = made.run()
    _apply(made, "experts")
    assert [t for t in made.targets() if "grouped" in t or "chunkft" in t] == [
        "transformers.grouped_mm_fallback.default",
        str(group_products),
    ]
    torch.testing.assert_close(made.run(), before)


@pytest.mark.parametrize("how", ["same", "broadcast", "cast"])
def test_a_copy_into_a_part_takes_its_own_bytes_only(how: str) -> None:
    into = torch.randn(4, 100)
    source = {"same": torch.randn(4, 2), "broadcast": torch.randn(1, 2), "cast": torch.randn(4, 2, dtype=torch.float64)}[how]
    made = Graph(into, source)
    part = made.call(aten.slice.Tensor, made.nodes[0], 1, 7, 9)
    copied = made.call(aten.copy.default, part, made.nodes[1])
    view = made.call(aten.view.dtype, copied, torch.int32)
    made.graph.output((made.call(aten.slice_scatter.default, made.nodes[0], copied, 1, 7, 9), view))
    before = made.run()
    write_copies_anew(made.graph, made.mode)
    made.graph.lint()
    assert "aten.copy.default" not in made.targets()
    for value, wanted in zip(made.run(), before, strict=True):
        assert torch.equal(value, wanted)
    last = next(node for node in reversed(made.graph.nodes) if node.target is aten.clone.default)
    assert sum(storages(last.meta["val"]).values()) == 4 * 2 * 4
    (cost,) = measure_calls([lambda: aten.clone.default(source, memory_format=torch.contiguous_format)], torch.device("cpu"))
    assert cost.end_nbytes <= source.numel() * source.element_size()
    assert storages(view.meta["val"]).keys() == storages(last.meta["val"]).keys(), "views behind it still see the old storage"


class _Squared(torch.autograd.Function):
    """Its backward computes something of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        double: torch.Tensor = 2 * x
        return double * grad


class _WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through the function."""
        squared: torch.Tensor = _Squared.apply(self.linear(x))  # type: ignore[no-untyped-call]
        return squared.sum()


def _captured(model: nn.Module, *args: torch.Tensor) -> Capture:
    return capture(model, args, {})


def test_what_a_functions_own_backward_computes_is_backward() -> None:
    found = _captured(_WithFunction(), torch.randn(3, 4))
    tags = {node.name: node.meta["partitioner_tag"] for node in found.graph.nodes if node.op == "call_function"}
    doubled = [node for node in found.graph.nodes if node.target is aten.mul.Tensor and 2 in node.args]
    assert len(doubled) == 1
    assert tags[doubled[0].name] == "is_backward"
    assert set(tags.values()) == {"is_forward", "is_backward"}


def test_bloom_has_such_a_function() -> None:
    config = transformers.BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=11, use_cache=False)
    ids = torch.zeros(1, 3, dtype=torch.long)
    found = capture(transformers.BloomForCausalLM(config), (), {"input_ids": ids, "labels": ids})
    assert all("partitioner_tag" in node.meta for node in found.graph.nodes if node.op == "call_function")


class _Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A convolution."""
        return functional.relu(self.conv(x)).sum()


def test_passes_can_be_left_out_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def items(found: Capture) -> int:
        return sum(node.target is operator.getitem and node.args[1] == 2 for node in found.graph.nodes)

    x = torch.randn(2, 2, 6)
    assert items(_captured(_Conv(), x)) == 0
    monkeypatch.setenv("CHUNKFT_SKIP_PASSES", "biases, copies")
    with caplog.at_level(logging.DEBUG, logger="chunkft_compile.passes"):
        assert items(_captured(_Conv(), x)) == 1
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "left out" in line] == [
        f"pass {name} is left out, as CHUNKFT_SKIP_PASSES says" for name in ("biases", "copies")
    ]
    assert any(line.startswith("pass experts: nothing, ") for line in said)
    monkeypatch.setenv("CHUNKFT_SKIP_PASSES", "bias")
    with pytest.raises(ValueError, match="CHUNKFT_SKIP_PASSES names 'bias', which is no pass; there are functions, "):
        _captured(_Conv(), x)


def test_the_runner_says_what_changed_and_refuses_a_broken_graph() -> None:
    made = Graph(torch.randn(3))
    made.graph.output(made.call(aten.neg.default, made.nodes[0]))

    def add_twice(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
        del fake_mode
        with graph.inserting_before(graph.output_node()):
            for _ in range(2):
                graph.call_function(aten.exp.default, (made.nodes[0],))

    (ran,) = run_passes(made.graph, made.mode, [Pass("adds", add_twice)])
    assert ran.changes == {"aten.exp.default": 2}
    assert str(ran).startswith("pass adds: aten.exp.default +2, ")

    def break_it(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
        del fake_mode
        late = graph.call_function(aten.exp.default, (made.nodes[0],))
        next(node for node in graph.nodes if node.target is aten.neg.default).args = (late,)

    with pytest.raises(RuntimeError):
        run_passes(made.graph, made.mode, [Pass("breaks", break_it)])
