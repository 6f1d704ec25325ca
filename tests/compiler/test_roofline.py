"""The roofline on graphs: FLOPs and bytes by hand, temporaries by rule, and measured operators within an order of magnitude."""

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.capture import capture
from chunkft_compile.costs import OperatorCosts, makes_bytes
from chunkft_compile.planner.devices import find_device
from chunkft_compile.roofline import RooflineCosts, flops, traffic_nbytes
from chunkft_compile.temporaries import accelerator_nbytes, cpu_nbytes
from tests.models import gpt2, llama, token_batch

aten = torch.ops.aten
A100 = find_device("a100-80")


def _call(target: Any, *args: Any, dtype: torch.dtype = torch.float32) -> fx.Node:
    """One call; tuples of integers are arguments of that shape, other values stand for themselves."""
    graph, mode = fx.Graph(), FakeTensorMode()
    arguments: list[Any] = []
    for argument in args:
        if isinstance(argument, tuple):
            node = graph.placeholder(f"x{len(arguments)}")
            with mode:
                node.meta["val"] = torch.empty(argument, dtype=dtype)
            arguments.append(node)
        elif isinstance(argument, torch.Tensor):
            node = graph.placeholder(f"x{len(arguments)}")
            node.meta["val"] = mode.from_tensor(argument)
            arguments.append(node)
        else:
            arguments.append(argument)
    node = graph.call_function(target, tuple(arguments))
    values = fx.node.map_arg(tuple(arguments), lambda source: source.meta["val"])
    with mode:
        node.meta["val"] = target(*values)
    graph.output((node,))
    return node


def test_a_product_is_bound_by_arithmetic() -> None:
    node = _call(aten.mm.default, (512, 256), (256, 1024), dtype=torch.bfloat16)
    assert flops(node) == 2 * 512 * 256 * 1024
    assert traffic_nbytes(node) == 2 * (512 * 256 + 256 * 1024 + 512 * 1024)
    expected = A100.us(flops(node), traffic_nbytes(node), "bfloat16")
    assert RooflineCosts(A100).us(node) == round(expected)


def test_tf32_only_where_torch_would_use_it() -> None:
    node = _call(aten.mm.default, (2048, 2048), (2048, 2048))
    plain, fast = RooflineCosts(A100).us(node), RooflineCosts(A100, tf32=True).us(node)
    assert plain > 5 * fast
    with pytest.raises(ValueError, match=r"no peak is known for mm in torch.float64 .*; load the model in bfloat16 or float32"):
        RooflineCosts(A100).us(_call(aten.mm.default, (4, 4), (4, 4), dtype=torch.float64))


def test_an_expanded_argument_is_read_once_and_a_table_by_rows() -> None:
    whole = _call(aten.mul.Tensor, (64, 32), (64, 32))
    row = _call(aten.mul.Tensor, (64, 32), torch.ones(32).expand(64, 32))
    assert traffic_nbytes(whole) - traffic_nbytes(row) == 4 * (64 * 32 - 32)
    lookup = _call(aten.embedding.default, (50_000, 32), torch.zeros(7, dtype=torch.int64))
    assert traffic_nbytes(lookup) == 2 * 7 * 32 * 4 + 7 * 8


def test_views_cost_next_to_nothing_and_graphs_add_up() -> None:
    costs = RooflineCosts(A100)
    view = _call(aten.t.default, (64, 32))
    assert (costs.us(view), costs.temporary_nbytes(view)) == (1, 0)
    node = _call(aten.exp.default, (64, 32))
    costs.measure([node.graph])
    assert costs.graph_us(node.graph) == costs.us(node) > 0


def test_temporaries_on_an_accelerator() -> None:
    assert accelerator_nbytes(_call(aten.mm.default, (8, 8), (8, 8))) == 0
    assert accelerator_nbytes(_call(aten.mul.Tensor, (8, 8), 2.0)) == 0
    assert accelerator_nbytes(_call(aten._log_softmax.default, (8, 8), -1, False)) == 0
    few, many = torch.zeros(100, dtype=torch.int64), torch.zeros(5000, dtype=torch.int64)
    assert accelerator_nbytes(_call(aten.embedding_dense_backward.default, (100, 16), few, 50, -1, False)) == 0
    assert accelerator_nbytes(_call(aten.embedding_dense_backward.default, (5000, 16), many, 50, -1, False)) == 48 * 5000 + 352_000
    mean = _call(aten.mean.dim, (4096, 4096), [-1], dtype=torch.bfloat16)
    assert accelerator_nbytes(mean) == 2**20  # partial sums, where a CPU copies to fp32:
    assert cpu_nbytes(mean) == 4 * 4096 * 4096


def test_in_place_is_the_same_kernel_without_a_result() -> None:
    product = _call(aten.addmm_.default, (512, 1024), (512, 256), (256, 1024), dtype=torch.bfloat16)
    made = _call(aten.addmm.default, (512, 1024), (512, 256), (256, 1024), dtype=torch.bfloat16)
    assert flops(product) == flops(made) == 2 * 512 * 256 * 1024
    assert traffic_nbytes(product) == traffic_nbytes(made) == 2 * (2 * 512 * 1024 + 512 * 256 + 256 * 1024)
    copy = _call(aten.copy_.default, (64, 32), (64, 32))
    assert (flops(copy), traffic_nbytes(copy)) == (0, 2 * 64 * 32 * 4)  # what it overwrites is not read
    add = _call(aten.add_.Tensor, (64, 32), (64, 32))
    assert (flops(add), traffic_nbytes(add)) == (0, 3 * 64 * 32 * 4)
    assert [accelerator_nbytes(node) for node in (product, copy, add)] == [0, 0, 0]
    assert cpu_nbytes(product) == cpu_nbytes(made) > 0


def test_attention_backward_keeps_an_fp32_gradient_of_the_query() -> None:
    found = capture(llama().bfloat16().train(), (), token_batch())
    by_name = {str(node.target).split(".")[1]: node for node in found.graph.nodes if "attention_for_cpu" in str(node.target)}
    forward, backward = (by_name[f"_scaled_dot_product_flash_attention_for_cpu{end}"] for end in ("", "_backward"))
    # [B, H, S, D] = [2, 4, 10, 4]; rows are padded to 128, widths to 32
    assert accelerator_nbytes(backward) == 4 * 2 * 4 * 128 * (1 + 32)
    assert accelerator_nbytes(forward) == 0
    products = 2 * 2 * 4 * 10 * 10 * 4  # one of [S, D] x [D, S] in every head: two forward, five backward
    assert (flops(forward), flops(backward)) == (2 * products, 5 * products)


def test_an_operator_without_a_rule_is_named_and_counted_double() -> None:
    costs = RooflineCosts(A100)
    node = _call(aten.linalg_inv_ex.default, (64, 64))
    assert costs.temporary_nbytes(node) >= 64 * 64 * 4
    assert costs.unknown == {"linalg_inv_ex"}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_operators_of_transformers_have_rules(make: Any) -> None:
    costs = RooflineCosts(A100)
    found = capture(make().train(), (), token_batch())
    costs.measure([found.graph])
    assert costs.unknown == set()


def test_temporaries_of_the_cpu_bound_the_measured_ones() -> None:
    found = capture(llama(hidden_size=64, intermediate_size=128).train(), (), token_batch(rows=4, tokens=32))
    measured, ruled = OperatorCosts(torch.device("cpu")), RooflineCosts(find_device("cpu"))
    measured.measure([found.graph])
    for node in found.graph.nodes:
        if makes_bytes(node):
            assert measured.temporary_nbytes(node) <= ruled.temporary_nbytes(node) + 64, node
