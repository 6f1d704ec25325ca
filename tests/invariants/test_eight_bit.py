"""8-bit optimizers of other libraries: the reference's weights, the predicted peak, and a loss like that of full precision.

They need `bitsandbytes` (the extra `8bit`) or `torchao`; without the package its tests are skipped.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from chunkft_compile.planner import Update
from chunkft_compile.runtime.state_tensors import tensors_in
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.invariants.test_memory import Lab
from tests.models import Case, compute_loss, llama, token_batch
from tests.support import reference
from tests.support.allocator import Allocator

pytestmark = [
    pytest.mark.usefixtures("captures_once"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:.*does not implement _stable_hash_for_caching"),
]

SWEEPS = 3
UPDATES = (Update.HELD, Update.IMMEDIATE)
# Wide enough that chunks have 4096 elements, from which on these libraries keep 8-bit state; the norms stay in full precision.
WIDE = Case("wide llama", partial(llama, hidden_size=64, intermediate_size=192), partial(token_batch, rows=2, tokens=8))
Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def _bitsandbytes(name: str) -> Make:
    library: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[8bit]'")
    settings = {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    return partial(getattr(library.optim, name), lr=1e-3, **settings)


def _torchao(name: str) -> Make:
    library: Any = pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install torchao")
    return partial(getattr(library, name), lr=1e-3)


def _train_and_compare(hook: Allocator, make: Make) -> Lab:
    """Three sweeps of a HELD and an IMMEDIATE step; the weights are the reference's to the bit, the peak is as predicted."""
    lab = Lab(hook, WIDE, 9.0, make=make, update="auto")
    steps = lab.slices_of_checked_sweeps(SWEEPS)
    assert len(steps) == SWEEPS * len(UPDATES)
    assert {int(state["step"]) for state in lab.optimizer.state.values()} == {SWEEPS}
    _, expected = reference.train(WIDE.build(), steps, make, [[lab.batch]] * len(steps), compute_loss=compute_loss)
    torch.testing.assert_close(dict(lab.model.state_dict()), dict(expected), rtol=1e-5, atol=1e-7)
    return lab


def _dtypes(lab: Lab) -> set[torch.dtype]:
    """Of the state of matrices."""
    return {t.dtype for leaf, state in lab.optimizer.state.items() if leaf.dim() == 2 for _, t in tensors_in(state) if t.dim() >= 2}


@pytest.fixture
def _by_hand(monkeypatch: pytest.MonkeyPatch, workshop: Workshop) -> None:
    workshop.capture(WIDE.build(), (), WIDE.batch(0) | {"use_cache": False})
    plan_by_hand(monkeypatch, UPDATES, resident=(0, 1))


QUICK = ("AdamW8bit", "Lion8bit")
OTHERS = ("PagedAdamW8bit", "AdamW", "SGD8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit", "LAMB8bit", "LARS8bit")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.usefixtures("_by_hand")
def test_bitsandbytes_trains_as_the_reference_in_the_predicted_bytes(allocator: Allocator, name: str) -> None:
    lab = _train_and_compare(allocator, _bitsandbytes(name))
    assert (torch.uint8 in _dtypes(lab)) == (name != "AdamW")
    tables = [state["qmap1"] for state in lab.optimizer.state.values() if "qmap1" in state]
    assert all(table is tables[0] for table in tables)


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.usefixtures("_by_hand", "_uncompiled")
def test_torchao_without_compiling_trains_as_the_reference_in_the_predicted_bytes(allocator: Allocator, name: str) -> None:
    lab = _train_and_compare(allocator, _torchao(name))
    assert any(type(value) is not torch.Tensor for state in lab.optimizer.state.values() for value in state.values())


@pytest.mark.slow  # a kernel is compiled for every shape of a chunk, 2 to 5 s each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.usefixtures("_by_hand")
def test_torchao_trains_as_the_reference_in_the_predicted_bytes(allocator: Allocator, name: str) -> None:
    _train_and_compare(allocator, _torchao(name))


@pytest.mark.usefixtures("_by_hand")
def test_a_saved_state_is_loaded_and_its_code_books_are_shared_again(allocator: Allocator) -> None:
    make = _bitsandbytes("AdamW8bit")
    lab = Lab(allocator, WIDE, 9.0, make=make, update="auto")
    lab.sweeps(1)
    lab.optimizer.load_state_dict(lab.optimizer.state_dict())
    lab.model.plan(**lab.batch)
    steps = lab.sweeps(1)
    assert all(step.measured <= step.predicted for step in steps)
    assert len({state["qmap1"].data_ptr() for state in lab.optimizer.state.values() if "qmap1" in state}) == 1


STEPS = 200
TOLERANCE = 0.05  # of the loss's fall


def _losses(model: nn.Module, optimizer: Optimizer) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = compute_loss(model, WIDE.batch(step % 8))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_eight_bit_state_learns_as_full_precision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    make = _bitsandbytes("AdamW8bit")
    plan_by_hand(monkeypatch, [Update.IMMEDIATE])
    plain = WIDE.build()
    exact = _losses(plain, AdamW(plain.parameters(), lr=1e-3))
    model = compile_quickly(WIDE.build(), 10**8, update="immediate")
    losses = _losses(model, make(model.parameters()))
    end, expected = sum(losses[-8:]) / 8, sum(exact[-8:]) / 8
    print(f"loss {exact[0]:.4f} -> {expected:.4f} in full precision, {end:.4f} in 8 bits")
    assert expected < exact[0] / 2, "it must learn something, or this says nothing"
    assert abs(end - expected) <= TOLERANCE * (exact[0] - expected)
