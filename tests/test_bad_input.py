"""What a user can get wrong in model, budget or loop, each with the message that says so."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

import chunkft_compile
from chunkft_compile import BudgetError, CaptureError
from chunkft_compile.errors import TrainingError
from tests.conftest import Workshop
from tests.invariants.harness import compile_quickly
from tests.models import CASES, Case, Mlp, compute_loss, gpt2, llama, token_batch, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
LLAMA, BERT, MLP = CASES[0], CASES[4], CASES[6]


def _loss(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return compute_loss(model, vector_batch(seed))


def _mlp() -> chunkft_compile.ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(Mlp(), PLENTY)


@pytest.mark.parametrize("budget", ["lots", "14 parsecs", "-1GB", "0", "120%", 0, -5, 1.5, None, True])
def test_a_malformed_budget_shows_the_forms(budget: Any) -> None:
    with pytest.raises(ValueError, match=r'write "14GB" \(10\^9 bytes\), "13\.5GiB" \(2\^30 bytes\)'):
        chunkft_compile.compile(Mlp(), budget)


@pytest.mark.parametrize("factor", [0.9, 1.05, 1.4])  # 0.9: below the weights themselves
@pytest.mark.parametrize("case", [MLP, pytest.param(LLAMA, marks=pytest.mark.slow), pytest.param(BERT, marks=pytest.mark.slow)])
def test_a_too_small_budget_names_the_smallest_that_works(case: Case, factor: float) -> None:
    batch = case.batch(0)
    args, kwargs = case.arguments()
    plain = case.build()
    weights = sum(p.numel() * 4 for p in plain.parameters())
    with pytest.raises(BudgetError, match=r"no schedule fits the budget of .*\n *the smallest that does is") as caught:
        compile_quickly(plain, int(weights * factor), weights=["device"]).plan(*args, **kwargs)
    smallest = caught.value.smallest_nbytes
    assert caught.value.binding
    assert caught.value.binding in str(caught.value)
    model = compile_quickly(case.build(), smallest, weights=["device"])
    optimizer = AdamW(model.parameters())
    torch.autograd.backward(compute_loss(model, batch))
    assert model.progress.predicted_nbytes <= smallest
    optimizer.step()


def test_nothing_to_train() -> None:
    model = Mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"Mlp has no trainable parameter \(requires_grad is False everywhere\): nothing to compile"):
        chunkft_compile.compile(model, PLENTY)


def test_another_mode_is_captured_anew(workshop: Workshop) -> None:
    """With dropout of one half: losses differ from call to call in training mode, never in evaluation mode."""
    plain = gpt2(dropout=0.5)
    model = compile_quickly(plain.train(), PLENTY)
    batch = token_batch()

    def losses() -> set[float]:
        found = []
        for _ in range(3):
            loss = compute_loss(model, batch)
            torch.autograd.backward(loss)
            model.zero_grad()
            found.append(loss.item())
        return set(found)

    before = workshop.captured
    assert len(losses()) == 3
    model.eval()
    assert not plain.training
    (without,) = losses()
    assert without == pytest.approx(compute_loss(plain, batch).item(), rel=1e-5)
    assert workshop.captured == before + 2
    model.train()
    assert len(losses()) == 3
    assert workshop.captured == before + 2


def test_two_optimizers_over_the_same_chunks() -> None:
    model = _mlp()
    first, second = SGD(model.parameters(), lr=0.1), AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"two optimizers \((SGD and AdamW|AdamW and SGD)\) train enter\.weight\[0:8\]; give each chunk"):
        _loss(model)
    assert first.state == second.state == {}


def test_two_optimizers_that_share_the_chunks_out() -> None:
    model = _mlp()
    names = [name for name, _ in model.named_parameters()]
    chunks = list(model.parameters())
    before = [chunk.detach().clone() for chunk in chunks]
    optimizers = [SGD(chunks[:2], lr=0.1), AdamW(chunks[2:])]
    torch.autograd.backward(_loss(model))
    for optimizer in optimizers:
        optimizer.step()
    assert [name for name, chunk, old in zip(names, chunks, before, strict=True) if torch.equal(chunk, old)] == []
    assert model.progress.sweep == 1


def test_an_optimizer_that_misses_chunks() -> None:
    model = _mlp()
    optimizer = SGD(list(model.parameters())[1:], lr=0.1)
    with pytest.raises(ValueError, match=r"SGD misses enter\.weight\[0:8\]: .* never be trained\. Build it from model\.parameters\(\)"):
        _loss(model)
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_of_the_models_own_parameters_is_seen_to_miss_all() -> None:
    plain = Mlp()
    optimizer = SGD(plain.parameters(), lr=0.1)
    model = compile_quickly(plain, PLENTY)
    with pytest.raises(ValueError, match="SGD misses"):
        _loss(model)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("retain_graph", [False, True])
def test_backward_twice(retain_graph: bool) -> None:
    model = _mlp()
    output = model(vector_batch()["x"])
    loss = output.sum()
    loss.backward(retain_graph=True)
    gradients = [chunk.leaf.grad.clone() for chunk in model.chunks if chunk.leaf.grad is not None]
    with pytest.raises(TrainingError, match=r"backward\(\) was already called on this loss; .*Run the forward again"):
        loss.backward(retain_graph=retain_graph)
    after = [chunk.leaf.grad for chunk in model.chunks if chunk.leaf.grad is not None]
    torch.testing.assert_close(after, gradients, rtol=0, atol=0)


def test_a_second_forward_before_the_backward() -> None:
    model = _mlp()
    loss = _loss(model)
    with pytest.raises(TrainingError, match=r"a second training forward before the backward .*drop the first loss \(del loss\)"):
        _loss(model)
    with torch.no_grad():
        assert _loss(model).item() == loss.item()
    del loss
    torch.autograd.backward(_loss(model))
    torch.autograd.backward(_loss(model))


def test_inputs_on_another_device() -> None:
    model = _mlp()
    with pytest.raises(ValueError, match=r"an input of shape \(4, 6\) is on meta, the model is on cpu; move it: batch\.to\('cpu'\)"):
        model(vector_batch()["x"].to("meta"))


def test_a_closure() -> None:
    model = _mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    torch.autograd.backward(_loss(model))
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\) is not supported: .*call backward\(\) before step\(\)"):
        optimizer.step(lambda: 0.0)


def test_lbfgs() -> None:
    model = _mlp()
    optimizer = LBFGS(model.parameters())
    with pytest.raises((TypeError, ValueError), match="LBFGS"):
        _loss(model)
    assert len(optimizer.param_groups) == 1


def test_frozen_after_compile() -> None:
    model = _mlp()
    model.chunks[2].leaf.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"middle\.weight\[0:8\] was frozen after compile\(\); freeze parameters before compile\(\)"):
        _loss(model)


def test_the_models_parameter_frozen_after_compile() -> None:
    model = _mlp()
    model.module.get_parameter("middle.weight").requires_grad_(False)
    with pytest.raises(TrainingError, match=r"middle\.weight.* was frozen after compile\(\)"):
        _loss(model)


@pytest.mark.parametrize(
    ("move", "error", "message"),
    [
        (lambda m: m.to(torch.bfloat16), RuntimeError, r"enter\.weight would go from torch\.float32 on cpu to torch\.bfloat16 on cpu"),
        (lambda m: m.half(), RuntimeError, "move or cast the model before compile"),
        (lambda m: m.to("meta"), RuntimeError, "from torch.float32 on cpu to torch.float32 on meta"),
        (copy.deepcopy, TypeError, r"cannot be copied: .*copy\.deepcopy\(model\.module\) copies the model"),
        (lambda m: m.load_state_dict(m.state_dict(), assign=True), ValueError, r"load_state_dict\(assign=True\) would part the weights"),
    ],
    ids=["bfloat16", "half", "meta", "deepcopy", "assign"],
)
def test_what_would_part_weights_and_chunks(move: Callable[[nn.Module], object], error: type[Exception], message: str) -> None:
    model = _mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        move(model)
    torch.testing.assert_close(model.state_dict(), before)
    torch.autograd.backward(_loss(model.to("cpu").float()))


class _Branching(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.sum() > 0:  # the line the error must name
            return y
        return -y


class _Selecting(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y[y.sum(1) > 0]


def _line_of(text: str) -> int:
    with open(__file__, encoding="utf-8") as source:
        return next(number for number, line in enumerate(source, 1) if text in line)


def test_control_flow_that_depends_on_data() -> None:
    model = compile_quickly(_Branching(), PLENTY)
    place = re.escape(f"{__file__}:{_line_of('# the line the error must name')}: if y.sum() > 0:")
    with pytest.raises(CaptureError, match=rf"cannot capture _Branching as one graph at {place}(.|\n)*way out:"):
        model(vector_batch()["x"])


def test_a_shape_that_depends_on_data() -> None:
    model = compile_quickly(_Selecting(), PLENTY)
    place = re.escape(f'"{__file__}", line {_line_of("return y[y" + ".sum(1) > 0]")}')
    with pytest.raises(CaptureError, match=rf"depends on the data(.|\n)*{place}(.|\n)*return y\[y\.sum\(1\) > 0\](.|\n)*way out:"):
        model(vector_batch()["x"])


def test_an_optimizer_built_after_the_plan() -> None:
    model = _mlp()
    SGD(model.parameters(), lr=0.1)
    torch.autograd.backward(_loss(model))
    bigger = Adam(model.parameters(), lr=0.1, amsgrad=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"the plan assumed .*, and Adam needs up to .* more for a chunk; build the optimizer before"):
        bigger.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert bigger.state == {}


def test_a_smaller_optimizer_built_after_the_plan_is_welcome() -> None:
    model = _mlp()
    torch.autograd.backward(_loss(model))
    before = copy.deepcopy(model.state_dict())
    SGD(model.parameters(), lr=0.1).step()
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_that_are_not_kept() -> None:
    model = compile_quickly(llama().train(), PLENTY)
    output = model(**token_batch())
    with pytest.raises(AttributeError, match=r"output 'logits' is not kept while training, .*compile\(\.\.\., outputs=\"all\"\) keeps it"):
        output.logits.shape  # noqa: B018
    with pytest.raises(ValueError, match='outputs is "loss" or "all", not \'logits\''):
        compile_quickly(llama(), PLENTY, outputs="logits")


def test_a_loss_from_kept_logits() -> None:
    plain = LLAMA.build()
    model = compile_quickly(LLAMA.build(), PLENTY, outputs="all")
    ids = token_batch()["input_ids"]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)

    torch.autograd.backward(loss(plain(input_ids=ids).logits))
    torch.autograd.backward(loss(model(input_ids=ids).logits))
    dense = {name: p.grad for name, p in plain.named_parameters()}
    for chunk in model.chunks:
        gradient = dense[chunk.param]
        assert gradient is not None
        torch.testing.assert_close(chunk.leaf.grad, gradient[chunk.start : chunk.stop], rtol=1e-4, atol=1e-6)
