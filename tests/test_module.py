"""`ChunkedModule` is the model it wraps: names, modes, saving, generation, state, loops, and an end without traces."""

import copy
import gc
import inspect
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from chunkft_compile import ChunkedModule, last_programs
from chunkft_compile.appearance import showing_forward_of
from chunkft_compile.errors import TrainingError
from tests.conftest import Workshop
from tests.invariants.harness import compile_quickly, slice_of, smallest_nbytes
from tests.models import CASES, Mlp, compute_loss, llama, token_batch, vector_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
LLAMA = CASES[0]


def _tight(workshop: Workshop) -> tuple[ChunkedModule, Optimizer]:
    """A Llama that needs several steps to a sweep."""
    model = compile_quickly(LLAMA.build(), smallest_nbytes(workshop, LLAMA) * 6 // 5)
    return model, AdamW(model.parameters(), lr=1e-2)


def _step(model: ChunkedModule, optimizer: Optimizer, batch: dict[str, torch.Tensor]) -> float:
    loss = compute_loss(model, batch)
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_attributes_and_names_are_the_models() -> None:
    plain = LLAMA.build()
    model = compile_quickly(plain, PLENTY)
    assert model.config is plain.config
    assert model.get_input_embeddings() is plain.get_input_embeddings()  # type: ignore[operator]
    assert list(model.state_dict()) == list(plain.state_dict())
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_this'"):
        _ = model.nothing_like_this
    with pytest.raises(TrainingError, match=r"there is no plan yet: call model\.plan\(\*\*batch\), or train one batch"):
        _ = model.progress


def test_its_class_and_what_forward_takes_are_the_models() -> None:
    """By these trainers choose how to save, which columns are labels, and what to pass."""
    plain = LLAMA.build()
    model = compile_quickly(plain, PLENTY)
    for kind in (ChunkedModule, transformers.PreTrainedModel, transformers.LlamaForCausalLM, nn.Module):
        assert isinstance(model, kind)
    assert not isinstance(model, transformers.GPT2LMHeadModel)
    assert model.__class__ is type(plain)
    assert type(model) is not type(plain)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert list(inspect.signature(compile_quickly(Mlp(), PLENTY).forward).parameters) == ["x"]
    assert repr(model) == f"ChunkedModule({plain!r})"


def test_a_model_whose_forward_tells_no_signature() -> None:
    class Nothing(Mlp):
        forward = None  # type: ignore[assignment]

    assert showing_forward_of(Nothing, ChunkedModule) is ChunkedModule


def test_named_parameters_are_rows_of_the_weights() -> None:
    plain = LLAMA.build()
    plain.get_parameter("model.norm.weight").requires_grad_(False)
    model = compile_quickly(plain, 4 * sum(p.numel() for p in plain.parameters()) * 2)
    named = dict(model.named_parameters(prefix="net"))
    frozen = named.pop("net.model.norm.weight")
    assert frozen is plain.get_parameter("model.norm.weight")
    assert len(named) == len(model.chunks) == len(list(model.parameters())) - 1
    for name, parameter in named.items():
        fqn, start, stop = slice_of(name.removeprefix("net."))
        rows = plain.get_parameter(fqn)[start:stop]
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert (parameter.data_ptr(), parameter.shape, parameter.stride()) == (rows.data_ptr(), rows.shape, rows.stride())


def test_modes_and_inference_are_the_models(workshop: Workshop) -> None:
    plain = LLAMA.build()
    model = compile_quickly(plain, PLENTY)
    before = workshop.captured
    assert model.eval() is model
    assert not any(module.training for module in [model, *plain.modules()])
    assert model.train() is model
    assert all(module.training for module in [model, *plain.modules()])
    with torch.no_grad():
        output = model(**token_batch())
        torch.testing.assert_close(output.logits, plain(**token_batch()).logits, rtol=0, atol=0)
    assert (workshop.captured, model.schedule) == (before, None)


def test_saved_models_load_with_the_trained_weights(tmp_path: Path) -> None:
    model = compile_quickly(LLAMA.build(), PLENTY)
    _step(model, SGD(model.parameters(), lr=1.0), token_batch())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = LLAMA.build()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(loaded.lm_head.weight, fresh.get_parameter("lm_head.weight"))


def test_generation_is_the_models() -> None:
    plain = LLAMA.build()
    model = compile_quickly(plain, PLENTY)
    prompt = token_batch()["input_ids"][:1, :4]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    words = model.generate(prompt, **settings)
    assert words.shape == (1, 9)
    assert torch.equal(words, plain.generate(prompt, **settings))  # type: ignore[operator]


def test_labels_that_are_the_inputs_do_not_bind_later_calls() -> None:
    """Tracing that takes the labels for the inputs, because they were one object, would give the second loss wrongly."""
    plain = llama(vocab_size=40).train()
    model = compile_quickly(plain, PLENTY)
    same, other = token_batch(0), token_batch(0) | {"labels": token_batch(1)["labels"]}
    assert same["labels"] is same["input_ids"]
    same, other = ({name: ids % 40 for name, ids in batch.items()} for batch in (same, other))
    same["labels"] = same["input_ids"]
    for batch in (same, other, same):
        loss = compute_loss(model, batch)
        expected = compute_loss(plain, batch)
        torch.autograd.backward(loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged since the last call."""
    found = [record.message for record in caplog.records if record.name == "chunkft_compile"]
    caplog.clear()
    return found


def test_a_larger_batch_plans_again_and_a_smaller_one_does_not(caplog: pytest.LogCaptureFixture) -> None:
    large = compile_quickly(Mlp(), PLENTY).plan(vector_batch(rows=32)["x"])
    assert len(large.steps) == 1
    model = compile_quickly(Mlp(), large.peak_nbytes - 1)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    caplog.set_level(logging.INFO, logger="chunkft_compile")
    _step(model, optimizer, vector_batch(rows=8))
    first = model.schedule
    assert [message.split()[0] for message in _messages(caplog)] == ["planned"]
    _step(model, optimizer, vector_batch(rows=4))
    assert model.schedule is first
    assert _messages(caplog) == []
    _step(model, optimizer, vector_batch(rows=32))
    assert model.schedule is not first
    again, planned = _messages(caplog)
    assert "does not fit this batch: planning again" in again
    assert planned.startswith("planned")
    assert model.schedule is not None
    assert model.schedule.peak_nbytes <= model.budget_nbytes


@pytest.mark.slow
def test_zero_grad_before_or_after_is_the_same(workshop: Workshop) -> None:
    states = []
    for before in (False, True):
        model, optimizer = _tight(workshop)
        for seed in range(3):
            if before:
                optimizer.zero_grad()
            torch.autograd.backward(compute_loss(model, token_batch(seed)))
            optimizer.step()
            if not before:
                model.zero_grad()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def _state_nbytes(optimizer: Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in tensors if value.numel() > 1)


@pytest.mark.slow
def test_state_of_inactive_chunks_is_in_the_store_and_in_the_state_dict(workshop: Workshop, allocator: Allocator) -> None:
    model, optimizer = _tight(workshop)
    model.plan(**token_batch())
    gc.collect()
    before = allocator.live()
    while model.progress.sweep < 1:
        _step(model, optimizer, token_batch())
    gc.collect()
    total = 2 * sum(chunk.nbytes for chunk in model.chunks if chunk.leaf.numel() > 1)
    assert model.schedule is not None
    resident = 2 * sum(model.chunks[number].nbytes for number in model.schedule.resident)
    assert resident < total
    assert _state_nbytes(optimizer) == total
    assert model.store_nbytes >= total - resident
    assert allocator.live() - before <= resident + 8 * len(model.chunks) + 1024

    saved = copy.deepcopy(optimizer.state_dict())  # as torch.save would: load_state_dict itself shares the tensors
    assert set(saved["state"]) == set(range(len(model.chunks)))
    twin = compile_quickly(LLAMA.build(), model.budget_nbytes)
    twin.load_state_dict(model.state_dict())
    resumed = AdamW(twin.parameters(), lr=1e-2)
    resumed.load_state_dict(saved)
    names = []
    for one, other in ((model, optimizer), (twin, resumed)):
        torch.autograd.backward(compute_loss(one, token_batch(7)))
        names.append(one.progress.active)
        other.step()
    assert names[0] == names[1]
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-6, atol=1e-7)
    assert any(state["step"].item() == 2 for state in resumed.state.values())


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.leave(self.norm(self.enter(x)))
        return y


def test_buffers_are_updated_as_in_plain_training() -> None:
    torch.manual_seed(0)
    plain, wrapped = _Normed(), _Normed()
    wrapped.load_state_dict(plain.state_dict())
    model = compile_quickly(wrapped, PLENTY)
    for trained in (plain, model):
        optimizer = SGD(trained.parameters(), lr=0.1)
        for seed in range(3):
            torch.autograd.backward(compute_loss(trained, vector_batch(seed)))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert plain.get_buffer("norm.num_batches_tracked").item() == 3


def test_models_share_one_pair_of_global_hooks() -> None:
    first = compile_quickly(Mlp(), PLENTY)
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    second = compile_quickly(Mlp(), PLENTY)
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks
    assert first is not second


def test_nothing_is_left_of_a_deleted_model(allocator: Allocator) -> None:
    compute_loss(Mlp(), vector_batch())  # what torch allocates at the first use of an operator
    gc.collect()
    before = allocator.live()
    plain = Mlp()
    model = compile_quickly(plain, PLENTY)
    optimizer = AdamW(model.parameters())
    _step(model, optimizer, vector_batch())
    assert allocator.live() > before
    alive: list[weakref.ref[Any]] = [weakref.ref(plain), weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.chunks[0].leaf)]
    del plain, model, optimizer
    gc.collect()
    assert all(reference() is None for reference in alive)
    assert allocator.live() == before


def test_a_bystanders_optimizer_is_left_alone() -> None:
    """The hooks are global: an optimizer over other parameters must step as ever."""
    model = compile_quickly(Mlp(), PLENTY)
    torch.autograd.backward(compute_loss(model, vector_batch()))
    other = nn.Linear(2, 2)
    optimizer = SGD(other.parameters(), lr=1.0)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight.detach().clone()
    optimizer.step(lambda: 0.0)  # a closure, which is refused only where chunks are stepped
    torch.testing.assert_close(other.weight.detach(), before - 1)
    assert model.progress.sweep == 0


class _Convolution(nn.Module):
    """Its large weight has no slicing rule: a range of rows may begin inside one group and end in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(64, 64, 3, groups=2)
        self.head = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.convolution(x)
        return self.head(mixed.mean(-1).relu()).sum()  # type: ignore[no-any-return]


def test_a_gradient_without_a_rule_is_whole_and_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = _Convolution()
    batch = torch.randn(2, 64, 8)
    plain(batch).backward()
    dense = plain.convolution.weight.grad
    assert dense is not None
    plain.zero_grad()
    model = compile_quickly(plain, 200_000)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(batch).backward()
    parts = [chunk for chunk in model.chunks if chunk.param == "convolution.weight"]
    assert len(parts) > 1
    assert model.dense_parameters == ("convolution.weight",)
    assert "no slicing rule for the gradient of convolution.weight" in caplog.text
    active = [chunk for chunk in parts if chunk.leaf.grad is not None]
    assert active
    for chunk in active:
        torch.testing.assert_close(chunk.leaf.grad, dense[chunk.start : chunk.stop], rtol=1e-4, atol=1e-6)
    optimizer.step()


def test_programs_can_be_read() -> None:
    model = compile_quickly(_Convolution(), 200_000)
    with pytest.raises(TrainingError, match=r"there is no plan yet: call model\.plan"):
        last_programs(model)
    schedule = model.plan(torch.randn(2, 64, 8))
    programs = last_programs(model)
    assert len(programs) == len(schedule.steps)
    for program in programs:
        first, *rest = program.splitlines()
        assert first.startswith("0 FORWARD of ")
        assert any(line.split()[1:2] == ["BACKWARD"] for line in rest)
        codes = program[program.index("code 0:") :].split("code ")[1:]
        for code in codes:  # it is Python
            compile(code.partition(":\n")[2], "code", "exec")
        assert "torch.ops.aten.convolution_backward.default" in program or "head" in first
