"""The backend of `torch.compile`: the same training as with `chunkft_compile.compile`, by optimizers over the user's own parameters."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import list_backends, register_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer

from chunkft_compile import ChunkedModule, TrainingError
from chunkft_compile.dynamo import chunked_of, chunkft
from chunkft_compile.runtime.adopting import ChunkedGradient
from tests.conftest import WITH_DYNAMO, Workshop
from tests.invariants.harness import Trained, compile_quickly, slice_of, smallest_nbytes
from tests.models import CASES, PLAIN, Case, Mlp, compute_loss, token_batch, vector_batch

pytestmark = WITH_DYNAMO

PLENTY = 10**8
LLAMA = CASES[0]
MLP = PLAIN[0]


@pytest.fixture(autouse=True)
def _registered() -> None:
    """Where the package is installed, its entry point is enough."""
    if "chunkft" not in list_backends(()):
        register_backend(chunkft)  # type: ignore[arg-type]


def _compiled(model: nn.Module | Callable[..., Any], budget: int, **options: Any) -> Any:
    return torch.compile(model, backend="chunkft", options={"budget": budget, "solve_seconds": 0.5, **options})


def _build(case: Case) -> nn.Module:
    """Without a key-value cache, which would be an output."""
    model = case.build()
    if hasattr(model, "config"):
        setattr(model.config, "use_cache", False)  # noqa: B010 (a Tensor or a Module to mypy)
    return model


def _step(model: nn.Module, optimizer: Optimizer, batch: dict[str, torch.Tensor]) -> float:
    loss = compute_loss(model, batch)
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _train(case: Case, model: nn.Module, chunked: Callable[[], ChunkedModule], optimizer: Optimizer, sweeps: int = 2) -> Trained:
    done = Trained([], [], [], {})
    while not done.losses or chunked().progress.sweep < sweeps:
        loss = compute_loss(model, case.batch(len(done.losses)))
        torch.autograd.backward(loss)
        done.losses.append(loss.item())
        done.steps.append(sorted(slice_of(name) for name in chunked().progress.active))
        optimizer.step()
        optimizer.zero_grad()
    assert len(done.losses) > sweeps, "nothing rotates"
    return done


@pytest.mark.parametrize("case", [pytest.param(MLP, id="mlp"), pytest.param(LLAMA, id="llama", marks=pytest.mark.slow)])
def test_the_backend_trains_as_compile_does(workshop: Workshop, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, over two sweeps, with nothing compiled anew while they rotate."""
    monkeypatch.setattr("chunkft_compile.runtime.meter._timed", lambda call, device: 1e-5)  # or noise gives other plans
    budget = smallest_nbytes(workshop, case) * 13 // 10
    unread = 8 if case is LLAMA else 0  # a copy of the rotary frequencies, which no graph reads and the backend never sees
    reference = compile_quickly(_build(case), budget + unread, outputs="all")
    expected = _train(case, reference, lambda: reference, AdamW(reference.parameters(), lr=1e-2))
    plain = _build(case)
    optimizer = AdamW(plain.parameters(), lr=1e-2)
    counters.clear()
    model = _compiled(plain, budget)
    trained = _train(case, model, lambda: chunked_of(plain), optimizer)
    assert trained.steps == expected.steps
    assert trained.losses == expected.losses
    torch.testing.assert_close(plain.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 1
    ours, theirs = chunked_of(plain).problem, reference.problem
    assert ours is not None
    assert theirs is not None
    assert ours.kinds == theirs.kinds


def _small(**options: Any) -> tuple[nn.Module, Any, Optimizer]:
    """A model, the same under torch.compile, and an optimizer over its own parameters."""
    plain = MLP.build()
    return plain, _compiled(plain, PLENTY, **options), AdamW(plain.parameters(), lr=1e-2)


def test_clipping_is_over_the_chunks_and_an_error_over_the_parameters() -> None:
    plain, model, optimizer = _small()
    torch.autograd.backward(compute_loss(model, vector_batch()))
    with pytest.raises(TrainingError, match=r"vector_norm on the gradient of a parameter that is trained in chunks"):
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    reference = MLP.build()
    torch.autograd.backward(compute_loss(reference, vector_batch()))
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    norm = nn.utils.clip_grad_norm_(leaves, 1e-3)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1e-3))
    gradients = torch.cat([leaf.grad.flatten() for leaf in leaves])
    torch.testing.assert_close(gradients, torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]))


def test_zero_grad_of_the_model_clears_the_gradients_of_the_chunks() -> None:
    plain, model, optimizer = _small()
    torch.autograd.backward(compute_loss(model, vector_batch(0)))
    plain.zero_grad()
    torch.autograd.backward(compute_loss(model, vector_batch(1)))
    reference = MLP.build()
    torch.autograd.backward(compute_loss(reference, vector_batch(1)))
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    torch.testing.assert_close([leaf.grad for leaf in leaves], [p.grad for p in reference.parameters()])
    torch.autograd.backward(compute_loss(model, vector_batch(1)))  # and without it, gradients add up
    torch.testing.assert_close(leaves[0].grad, 2 * next(reference.parameters()).grad)  # type: ignore[operator]
    assert isinstance(next(plain.parameters()).grad, ChunkedGradient)


def test_an_optimizer_built_after_the_first_backward_is_adopted_at_its_step() -> None:
    plain = MLP.build()
    model = _compiled(plain, PLENTY)
    torch.autograd.backward(compute_loss(model, vector_batch()))
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    SGD(plain.parameters(), lr=0.1).step()
    reference = MLP.build()
    torch.autograd.backward(compute_loss(reference, vector_batch()))
    for now, old, dense in zip(plain.parameters(), before, reference.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), old - 0.1 * dense.grad)  # type: ignore[operator]


@pytest.mark.parametrize("budget", [PLENTY, 0])
def test_state_from_before_goes_to_the_chunks_row_by_row(workshop: Workshop, budget: int) -> None:
    """A step of plain training, then one of chunks, is two of plain training on what was trained."""
    plain, reference = MLP.build(), MLP.build()
    optimizers = [AdamW(model.named_parameters(), lr=1e-2) for model in (plain, reference)]
    for model, optimizer in zip((plain, reference), optimizers, strict=True):
        _step(model, optimizer, vector_batch(0))
    model = _compiled(plain, budget or smallest_nbytes(workshop, MLP) * 13 // 10)
    torch.autograd.backward(compute_loss(model, vector_batch(1)))
    active = [slice_of(name) for name in chunked_of(plain).progress.active]
    optimizers[0].step()
    _step(reference, optimizers[1], vector_batch(1))
    assert bool(budget) == (len(active) == len(list(reference.parameters())))
    for name, start, stop in active:
        torch.testing.assert_close(plain.get_parameter(name)[start:stop], reference.get_parameter(name)[start:stop])
    names = optimizers[0].param_groups[0]["param_names"]
    assert names == [chunk.name for chunk in chunked_of(plain).chunks]


def test_state_without_rows_is_refused_before_anything_is_changed(workshop: Workshop) -> None:
    plain = MLP.build()
    optimizer = torch.optim.Adafactor(plain.parameters(), lr=1e-2)
    _step(plain, optimizer, vector_batch(0))
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    with pytest.raises(TrainingError, match=r"Adafactor has state row_var for enter\.weight from before, which cannot be divided"):
        _compiled(plain, smallest_nbytes(workshop, MLP) * 13 // 10)(vector_batch(0)["x"])
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == held


def test_evaluation_runs_the_graph_as_it_is() -> None:
    plain, model, optimizer = _small()
    batch = vector_batch()
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        expected = plain(batch["x"])
        assert torch.equal(model(batch["x"]), expected)
        with pytest.raises(ValueError, match="Mlp has not been compiled by the backend chunkft: make a training call first"):
            chunked_of(plain)
        with torch.enable_grad():
            _step(model, optimizer, batch)
        assert not torch.equal(model(batch["x"]), expected)
        assert torch.equal(model(batch["x"]), plain(batch["x"]))
    assert chunked_of(plain).progress.sweep == 1


@pytest.mark.parametrize(
    ("case", "batch", "name"),
    [
        pytest.param(MLP, vector_batch, "rows", id="rows"),
        pytest.param(LLAMA, token_batch, "tokens", id="tokens", marks=pytest.mark.slow),
    ],
)
def test_other_lengths_are_signatures_of_the_same_chunked_model(case: Case, batch: Callable[..., dict[str, Any]], name: str) -> None:
    """Dynamo's second graph has symbolic sizes; chunks, optimizer state and the sweep go on."""
    plain, reference = _build(case), _build(case)
    model, optimizer = _compiled(plain, PLENTY), AdamW(plain.parameters(), lr=1e-2)
    other = AdamW(reference.parameters(), lr=1e-2)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for size in (10, 12, 10):
            loss = _step(model, optimizer, batch(**{name: size}))
            assert loss == pytest.approx(_step(reference, other, batch(**{name: size})), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert chunked_of(plain).progress.sweep == 3


@pytest.mark.slow
def test_a_function_from_the_batch_to_the_loss_is_enough() -> None:
    plain = _build(LLAMA)
    optimizer = AdamW(plain.parameters(), lr=1e-2)

    def compute(**batch: torch.Tensor) -> torch.Tensor:
        return compute_loss(plain, batch)

    torch.autograd.backward(_compiled(compute, PLENTY)(**token_batch()))
    optimizer.step()
    assert chunked_of(plain).chunks[0].name.startswith("model.embed_tokens.weight[")
    assert chunked_of(plain).progress.sweep == 1


class _Broken(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        torch._dynamo.graph_break()
        y: torch.Tensor = self.leave(torch.relu(self.middle(x)))
        return y


def _refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=match):
        call()


def test_a_graph_break_is_refused_with_its_place() -> None:
    model = _Broken()
    before = [parameter.clone() for parameter in model.parameters()]
    _refused(
        lambda: _compiled(model, PLENTY)(vector_batch()["x"]), r"(?s)CaptureError: the graph breaks at .*test_dynamo.py:\d+:.*graph_break"
    )
    torch.testing.assert_close(before, list(model.parameters()), rtol=0, atol=0)


def test_a_compiled_loop_is_refused_at_backward() -> None:
    plain, _, optimizer = _small()
    step = _compiled(functools.partial(_step, plain, optimizer), PLENTY)
    _refused(
        lambda: step(vector_batch()), r"(?s)the graph breaks at .*models.py|test_dynamo.py.*compile the model, or a function from the batch"
    )


def test_parts_of_a_model_are_refused() -> None:
    plain = Mlp()
    plain.enter, plain.middle = _compiled(plain.enter, PLENTY), _compiled(plain.middle, PLENTY)
    message = r"(?s)the input L\['args'\]\[0\] of shape \(4, 8\) needs a gradient and is no parameter.*fullgraph=True"
    with torch._dynamo.config.patch(error_on_recompile=False):
        _refused(lambda: plain(vector_batch()["x"]), message)


def test_a_graph_that_trains_nothing_is_refused() -> None:
    plain = Mlp().requires_grad_(False)
    _refused(lambda: _compiled(plain, PLENTY)(vector_batch()["x"]), r"(?s)no input of this graph is a trainable parameter.*no_grad")


def test_another_set_of_parameters_is_refused() -> None:
    plain, model, optimizer = _small()
    _step(model, optimizer, vector_batch())
    plain.get_parameter("enter.weight").requires_grad_(False)
    with torch._dynamo.config.patch(error_on_recompile=False):
        _refused(lambda: model(vector_batch()["x"]), "a graph of this model lacks enter.weight, unlike the first one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r'needs a budget: torch.compile\(model, backend="chunkft", options={"budget": "14GB"}\)'),
        ({"budget": "plenty"}, "plenty"),
        ({"budget": PLENTY, "device": "cuda"}, "has no option 'device': move the model before torch.compile"),
        ({"budget": PLENTY, "bugdet": 1}, "has no option 'bugdet', only budget, accumulation"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    _refused(lambda: torch.compile(Mlp(), backend="chunkft", options=options)(vector_batch()["x"]), message)


def test_other_options_for_the_same_parameters_are_refused() -> None:
    plain, model, optimizer = _small()
    _step(model, optimizer, vector_batch())
    torch._dynamo.reset()
    _refused(lambda: _compiled(plain, 2 * PLENTY)(vector_batch()["x"]), "trained with the options .*'budget': 100000000.* already")


def test_training_goes_on_after_dynamo_forgot_its_graphs() -> None:
    """The optimizer has the chunks: another set of them would never be stepped."""
    plain, model, optimizer = _small()
    _step(model, optimizer, vector_batch())
    first = chunked_of(plain)
    torch._dynamo.reset()
    _step(_compiled(plain, PLENTY), optimizer, vector_batch())
    assert chunked_of(plain) is first
    assert first.progress.sweep == 2
