"""`compile(..., backend="inductor")`: the same training in the bytes of the same plan, with each kind compiled once."""

import functools
import re
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.optim import AdamW

from chunkft_compile import ChunkedModule
from chunkft_compile.codes import Code, Demand, Read
from chunkft_compile.inductor import _compare, _draws, _lower, _measure
from tests.conftest import Workshop
from tests.invariants.harness import RESIDENT, compile_quickly
from tests.models import PLAIN, Case, Mlp, compute_loss, llama, token_batch, vector_batch

# torch's own (2.13.0), when Inductor is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

CPU = torch.device("cpu")
MLP = PLAIN[0]
WIDE = Case("llama", functools.partial(llama, hidden_size=32, intermediate_size=96), functools.partial(token_batch, rows=2, tokens=8))


def _sliced_product() -> Code:
    """Rows of the gradient of a weight: `length` columns of one factor, times the other."""
    graph = fx.Graph()
    factors, start = [graph.placeholder("a0"), graph.placeholder("a1")], graph.placeholder("start0")
    for node, shape in zip(factors, ((16, 12), (16, 5)), strict=True):
        node.meta["val"] = torch.empty(shape)
    start.meta["val"] = 0
    rows = graph.call_function(torch.ops.aten.narrow.default, (factors[0], 1, start, 4))
    turned = graph.call_function(torch.ops.aten.t.default, (rows,))
    product = graph.call_function(torch.ops.aten.mm.default, (turned, factors[1]))
    rows.meta["val"] = factors[0].meta["val"].narrow(1, 0, 4)
    turned.meta["val"] = rows.meta["val"].t()
    product.meta["val"] = torch.empty(4, 5)
    graph.output((product,))
    return Code(graph, (Read(-1), Read(-2)), (), (Demand(0, 4),), ())


def test_one_compilation_serves_every_slice_and_frees_what_it_is_given() -> None:
    code = _sliced_product()
    call = _lower(code)
    wide, narrow = torch.randn(16, 12), torch.randn(16, 5)
    for start in range(9):
        arguments: list[Any] = [wide, narrow, start]
        (rows,) = call(arguments)
        assert arguments == []
        torch.testing.assert_close(rows, (wide.t() @ narrow)[start : start + 4])
    with pytest.raises(RuntimeError, match="u0 <= 8"):
        call([wide, narrow, 9])
    assert not _draws(code, CPU)
    _compare(code, call)
    assert _measure(code, call, frozenset(), CPU) == 4 * 5 * 4


def _train(model: ChunkedModule, case: Case, sweeps: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer, losses = AdamW(model.parameters(), lr=1e-2), list[float]()
    while not losses or model.progress.sweep < sweeps:
        loss = compute_loss(model, case.batch(len(losses)))
        torch.autograd.backward(loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def _hungry(code: Code, arguments: list[Any]) -> Any:
    _room = torch.empty(10**6)
    return code.call(arguments)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (_hungry, r"Inductor's needs 4.\d MB above its inputs, where the plan counts \d"),
        (lambda code, arguments: [2 * result for result in code.call(arguments)], r"a result of shape \(4, \d\) is another"),
        (lambda code, arguments: [result.t().clone().t() for result in code.call(arguments)], "results lie elsewhere, or in other strides"),
        (lambda code, arguments: [torch.cat([r, r])[: len(r)] for r in code.call(arguments)], "results keep .* more"),
        (lambda code, arguments: code.call([a.add_(1) if torch.is_tensor(a) else a for a in arguments]), "changes its inputs"),
    ],
)
def test_what_is_not_certified_runs_as_it_is(captures_once: Workshop, monkeypatch: pytest.MonkeyPatch, made: Any, reason: str) -> None:
    monkeypatch.setattr("chunkft_compile.inductor._lower", lambda code: functools.partial(made, code))
    expected = _train(compile_quickly(MLP.build(), 10**8), MLP)
    model = compile_quickly(MLP.build(), 10**8, backend="inductor")
    assert (model.eager_codes, model.compiled_codes) == ((), 0)
    losses, state = _train(model, MLP)
    assert losses == expected[0]
    torch.testing.assert_close(state, expected[1], rtol=0, atol=0)
    assert any(re.search(rf"^(for|back)ward of .*: .*{reason}", code) for code in model.eager_codes)


def test_what_inductor_cannot_compile_runs_as_it_is(captures_once: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(code: Code) -> Any:
        raise AssertionError("no such lowering\nand more")

    monkeypatch.setattr("chunkft_compile.inductor._lower", lower)
    model = compile_quickly(MLP.build(), 10**8, backend="inductor")
    _train(model, MLP)
    assert model.eager_codes
    assert all(code.endswith("Inductor fails: AssertionError: no such lowering") for code in model.eager_codes)


def test_dropout_is_drawn_as_without_inductor(captures_once: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkft_compile.inductor._lower", lambda code: code.call)
    case = Case("dropout", lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)), vector_batch)
    losses = []
    for backend in ("eager", "inductor"):
        model = compile_quickly(case.build(), 10**8, backend=backend)
        model.plan(vector_batch()["x"])
        torch.manual_seed(7)
        losses.append(_train(model, case, 3)[0])
    assert losses[0] == losses[1]
    (reason,) = model.eager_codes
    assert re.fullmatch("forward of .*: it draws random numbers, which Inductor would draw in another order", reason)
    assert model.compiled_codes > 0


def test_the_backend_has_a_name() -> None:
    with pytest.raises(ValueError, match='backend is "eager" or "inductor", not \'triton\''):
        compile_quickly(Mlp(), 10**8, backend="triton")


@pytest.mark.slow
def test_training_is_that_of_eager_codes_and_layers_share_compilations(captures_once: Workshop) -> None:
    made = []
    for layers in (2, 4):
        case = Case("llama", functools.partial(llama, hidden_size=32, intermediate_size=96, num_hidden_layers=layers), WIDE.batch)
        expected = _train(compile_quickly(case.build(), 10**8), case, 4)
        model = compile_quickly(case.build(), 10**8, backend="inductor")
        losses, state = _train(model, case, 4)
        assert losses == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(state, expected[1], rtol=1e-3, atol=1e-4)
        assert model.compiled_codes > len(model.eager_codes)
        made.append(model._session.inductor.compilations)  # type: ignore[union-attr]
    assert made[0] == made[1] == 6, "prelude, block and head, forward and backward"


@pytest.mark.slow
def test_nothing_compiles_anew_while_the_active_set_rotates(captures_once: Workshop) -> None:
    case = Case("llama", WIDE.make, WIDE.batch)
    plain = case.build()
    model = compile_quickly(plain, int(sum(p.nbytes for p in plain.parameters()) * 1.9), backend="inductor", **RESIDENT)
    _train(model, case)
    inductor = model._session.inductor
    assert inductor is not None
    before = inductor.compilations
    assert model.progress.steps > 1
    assert before > 0
    counters.clear()
    _train(model, case, 3)
    assert inductor.compilations == before
    assert not counters["inductor"]
