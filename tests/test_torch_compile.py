"""`torch.compile` before and around a chunked model: one changes nothing, the other runs it as it is and never compiles anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import AdamW, Optimizer

from chunkft_compile import ChunkedModule
from chunkft_compile.capture import capture
from tests.conftest import WITH_DYNAMO, Workshop
from tests.invariants.harness import compile_quickly, smallest_nbytes
from tests.models import CASES, PLAIN, Batch, compute_loss, sequential, vector_batch

pytestmark = WITH_DYNAMO

PLENTY = 10**8
LLAMA = CASES[0]
MLP = PLAIN[0]

Step = Callable[[Batch], torch.Tensor]


@dataclass
class _Loop:
    """A model that needs several steps to a sweep, and its optimizer."""

    model: ChunkedModule
    optimizer: Optimizer

    def sweeps(self, step: Step, count: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
        """The losses of whole sweeps, and the weights after them."""
        losses: list[float] = []
        while not losses or self.model.progress.sweep < count:
            losses.append(step(vector_batch(len(losses))).item())
            self.optimizer.zero_grad()
        assert len(losses) > count, "nothing rotates"
        return losses, {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def loop(workshop: Workshop) -> Callable[[], _Loop]:
    """Makes the same one every time."""

    def make() -> _Loop:
        model = compile_quickly(MLP.build(), smallest_nbytes(workshop, MLP) * 6 // 5)
        return _Loop(model, AdamW(model.parameters(), lr=1e-2))

    return make


def _trained(model: nn.Module, optimizer: Optimizer, *, clipped: bool = False) -> Step:
    def step(batch: Batch) -> torch.Tensor:
        loss = compute_loss(model, batch)
        torch.autograd.backward(loss)
        if clipped:
            nn.utils.clip_grad_norm_((leaf for group in optimizer.param_groups for leaf in group["params"]), 1.0)
        optimizer.step()
        return loss

    return step


def _equal(got: tuple[Sequence[float], dict[str, torch.Tensor]], expected: tuple[Sequence[float], dict[str, torch.Tensor]]) -> None:
    assert got[0] == expected[0]
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)


def test_a_model_under_torch_compile_is_taken_out_of_it() -> None:
    plain = LLAMA.build()
    model = compile_quickly(torch.compile(plain), PLENTY)  # type: ignore[arg-type]
    assert model.module is plain
    assert model.chunks[0].name.startswith("model.embed_tokens.weight[")


@pytest.mark.parametrize("how", ["in place", "its layers", "its forward"])
def test_compiled_parts_are_captured_as_their_sources(how: str) -> None:
    (x, plain), expected = (vector_batch()["x"], sequential()), compile_quickly(sequential(), PLENTY).plan(vector_batch()["x"])
    match how:
        case "in place":
            plain.compile(backend=_refuse)
        case "its layers":
            for layer in plain.children():
                layer.compile(backend=_refuse)
        case "its forward":
            plain.forward = torch.compile(plain.forward, backend=_refuse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chunkft_compile.making.capture_shallow", capture)  # the workshop would give that of the plain model
        assert compile_quickly(plain, PLENTY).plan(x).peak_nbytes == expected.peak_nbytes


def _refuse(*_: object) -> Callable[..., object]:
    raise AssertionError("compiled on its own, not as a part of the capture")


def test_torch_compile_around_a_chunked_model_changes_nothing(loop: Callable[[], _Loop]) -> None:
    plain, wrapped = loop(), loop()
    expected = plain.sweeps(_trained(plain.model, plain.optimizer))
    counters.clear()
    compiled = torch.compile(wrapped.model)
    _equal(wrapped.sweeps(_trained(compiled, wrapped.optimizer)), expected)  # type: ignore[arg-type]
    assert counters["frames"]["total"] == 1
    assert not counters["aot_autograd"], "something of it was compiled"


def test_a_training_step_may_be_compiled(loop: Callable[[], _Loop]) -> None:
    """Backward and the optimizer's step run as they are; nothing compiles anew when other chunks become active."""
    plain, wrapped = loop(), loop()
    expected = plain.sweeps(_trained(plain.model, plain.optimizer))
    step = torch.compile(_trained(wrapped.model, wrapped.optimizer), backend="eager")
    _equal(wrapped.sweeps(step), expected)
    assert torch._dynamo.utils.counters["frames"]["total"] > 0


@pytest.mark.slow
def test_clipping_may_be_compiled_and_is_compiled_for_each_step_of_the_sweep(loop: Callable[[], _Loop]) -> None:
    plain, wrapped = loop(), loop()
    expected = plain.sweeps(_trained(plain.model, plain.optimizer, clipped=True))
    step = torch.compile(_trained(wrapped.model, wrapped.optimizer, clipped=True), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        _equal(wrapped.sweeps(step), expected)


def test_an_optimizer_of_another_model_may_still_be_compiled(loop: Callable[[], _Loop]) -> None:
    """Hooks of optimizers are global; that of a chunked model must not keep Dynamo away from others."""
    plain = loop()
    plain.sweeps(_trained(plain.model, plain.optimizer), count=1)
    other = nn.Linear(3, 3)
    other.weight.grad = torch.ones(3, 3)
    optimizer = torch.optim.SGD([other.weight], lr=0.1)
    before, seen = other.weight.detach().clone(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    torch.compile(optimizer.step, backend=backend)()
    torch.testing.assert_close(other.weight.detach(), before - 0.1)
    assert seen, "nothing of the step was compiled"
