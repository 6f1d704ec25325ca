"""A tiled head: the loss and every gradient of the untiled one, in fewer bytes, with no value of size [tokens, vocab]."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from chunkft_compile import tiling
from chunkft_compile.assembly import Rows
from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering
from chunkft_compile.probing import probe
from chunkft_compile.segments import cut
from tests import models
from tests.conftest import Workshop
from tests.invariants.harness import Bench, bench, compile_quickly, smallest_nbytes, train_sweeps
from tests.invariants.test_memory import Lab
from tests.models import Case, Tagger, compute_loss, counted_batch, gpt2, llama, masked_batch, token_batch
from tests.support import reference
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")
few = settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

TAGGERS: dict[str, Callable[[], nn.Module]] = {
    "bias": Tagger,
    "tied in one segment": functools.partial(Tagger, tied=True),
    "label smoothing": functools.partial(Tagger, label_smoothing=0.1),
    "weights of classes": functools.partial(Tagger, weighted=True),
    "sum": functools.partial(Tagger, reduction="sum"),
    "no reduction": functools.partial(Tagger, reduction="none"),
}
CASES = (
    Case("llama", llama, masked_batch),
    Case("llama, items counted", llama, counted_batch),
    Case("llama-tied", functools.partial(llama, tied=True), masked_batch),
    Case("llama bf16", lambda: llama().bfloat16(), masked_batch),
    Case("gpt2-tied", gpt2, masked_batch),
    Case("gemma2", models.gemma2, masked_batch),
    Case("bert-tied", models.bert_masked, masked_batch),
    *(Case(name, make, masked_batch) for name, make in TAGGERS.items()),
    Case("tagger bf16", lambda: Tagger().bfloat16(), masked_batch),
)
WIDE = Case("wide llama", functools.partial(llama, vocab_size=256, tied=True), functools.partial(token_batch, rows=4, tokens=32))


def _thirds(found: Bench) -> dict[int, Rows]:
    """Every parameter in two pieces of unequal length."""
    pieces = []
    for name in found.names:
        size = found.dense[name].shape[0]
        pieces += [Rows(name, start, stop, size) for start, stop in itertools.pairwise(sorted({0, size // 3, size}))]
    return dict(enumerate(pieces))


def _whole(found: Bench) -> dict[int, Rows]:
    return {i: Rows(name, 0, found.dense[name].shape[0], found.dense[name].shape[0]) for i, name in enumerate(found.names)}


def _check(found: Bench, chunks: dict[int, Rows], option: str) -> None:
    """Against autograd: relative to the largest entry, and bf16 by its own rounding."""
    result, gradients = found.run(chunks, found.options(option))
    tolerance = 1e-5 if found.result.dtype == torch.float32 and found.dense[found.names[0]].dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result, found.result, rtol=min(tolerance, 1e-2), atol=0)
    for number, rows in chunks.items():
        gradient, dense = gradients[number], found.dense[rows.param]
        assert gradient is not None, rows
        scale = max(dense.abs().max().item(), 1e-3)
        message = functools.partial("{}, {}: {}".format, rows, option)
        torch.testing.assert_close(gradient, dense[rows.start : rows.stop], rtol=0, atol=tolerance * scale, msg=message)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_autograd(workshop: Workshop, case: Case) -> None:
    found = bench(workshop, case)
    assert found.lowering.untiled(found.lowering.segments[-1]) is None
    for option in ("tiled 2", "tiled 3", "tiled 64"):  # 20 tokens: in halves, with a shorter last tile, one by one
        _check(found, _thirds(found), option)
    _check(found, _whole(found), "tiled 3")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_tile_is_the_untiled_head_bit_for_bit(workshop: Workshop, case: Case) -> None:
    found = bench(workshop, case)
    chunks = _thirds(found)
    options = [option if option != "inputs" else "cheap" for option in found.options("tiled 1")]
    result, gradients = found.run(chunks, options)
    expected, others = found.run(chunks, ["cheap"] * len(options))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)  # a mean is a sum and a division here
    for number in chunks:
        torch.testing.assert_close(gradients[number], others[number], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "label smoothing", "tied in one segment"])
@few
@given(data=st.data())
def test_any_rows_in_any_number_of_tiles(workshop: Workshop, name: str, data: st.DataObject) -> None:
    found = bench(workshop, next(case for case in CASES if case.name == name))
    count = data.draw(st.integers(1, 2 * models.TOKENS))
    chunks: dict[int, Rows] = {}
    for param in data.draw(st.lists(st.sampled_from(found.names), min_size=1, max_size=3, unique=True)):
        size = found.dense[param].shape[0]
        start = data.draw(st.integers(0, size - 1))
        chunks[len(chunks)] = Rows(param, start, data.draw(st.integers(start + 1, size)), size)
    _check(found, chunks, f"tiled {count}")


def _largest_nbytes(found: Bench, option: str) -> int:
    """The largest storage that calls of the last segment make, in bytes."""
    assembled = found.assemble(_thirds(found), found.options(option))
    last = len(found.lowering.segments) - 1
    codes = {assembled.codes[call.code] for call in assembled.program.instructions if call.segment == last and call.code >= 0}
    sizes = []
    for code in codes:
        nodes = list(code.graph.nodes)
        given_ = {storage for node in nodes if node.op == "placeholder" for storage in storages(node.meta["val"])}
        made = [storages(node.meta["val"]) for node in nodes if node.op == "call_function"]
        sizes += [nbytes for values in made for storage, nbytes in values.items() if storage not in given_]
    return max(sizes)


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case.name], ids=lambda case: case.name)
def test_nothing_has_the_size_of_the_logits(workshop: Workshop, case: Case) -> None:
    found = bench(workshop, case)
    logits = 2 * models.TOKENS * models.VOCABULARY * 4
    assert _largest_nbytes(found, "inputs") >= logits
    weights = max(dense[: math.ceil(len(dense) * 2 / 3) + 1].nbytes for dense in found.dense.values())
    assert _largest_nbytes(found, "tiled 10") <= max(logits // 10, weights) < logits


def test_dropout_before_the_head_is_drawn_once(workshop: Workshop) -> None:
    found = bench(workshop, Case("gpt2 with dropout", functools.partial(gpt2, dropout=0.3), masked_batch))
    runs = []
    for option in ("save", "tiled 3"):
        found.assemble(_thirds(found), found.options(option))  # measures operators, dropout too
        torch.manual_seed(3)
        runs.append(found.run(_thirds(found), found.options(option)))
    (result, gradients), (expected, others) = runs
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    for number in gradients:
        torch.testing.assert_close(gradients[number], others[number], rtol=1e-4, atol=1e-6)


def test_more_tiles_need_fewer_bytes(workshop: Workshop) -> None:
    found = bench(workshop, WIDE)
    lowering = found.lowering
    assert lowering.options(lowering.segments[-1])[3:] == ("tiled 2", "tiled 4", "tiled 8")
    table = probe(lowering, list(_thirds(found).values()), workshop.costs)
    for costs in (table.kinds[table.segments[-1].kind].passing, table.kinds[table.segments[-1].kind].active):
        bytes_of = {cost.option: (cost.forward_peak_nbytes, cost.backward_peak_nbytes + cost.saved_nbytes) for cost in costs}
        rising = [bytes_of[name] for name in ("tiled 8", "tiled 4", "tiled 2", "inputs")]
        assert rising == sorted(rising)
        assert bytes_of["tiled 8"][1] < bytes_of["inputs"][1] // 2
    for segment in lowering.segments[:-1]:
        assert lowering.options(segment) == ("save", "cheap", "inputs")


def _untiled_smallest_nbytes(workshop: Workshop, patch: pytest.MonkeyPatch) -> int:
    """What the smallest schedule needs where no tiles are offered."""
    fresh = Case("wide llama without tiles", WIDE.make, WIDE.batch)
    with patch.context() as without:
        without.setattr(tiling, "COUNTS", ())
        return smallest_nbytes(workshop, fresh)


@pytest.mark.slow
def test_a_budget_that_only_tiles_meet_trains_like_the_reference(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = smallest_nbytes(workshop, WIDE)
    budget = (smallest + _untiled_smallest_nbytes(workshop, monkeypatch)) // 2
    assert smallest * 5 // 4 < budget
    make = functools.partial(AdamW, lr=1e-2, eps=1e-3)
    model = compile_quickly(WIDE.build(), budget)
    optimizer = make(model.parameters())
    schedule = model.plan(**WIDE.batch(0))
    assert all(step.options[-1].startswith("tiled") for step in schedule.steps)
    trained = train_sweeps(WIDE, model, optimizer, sweeps=2, micro=1)
    batches = [[WIDE.batch(seed) for seed in seeds] for seeds in trained.seeds]
    losses, state = reference.train(WIDE.build(), trained.steps, make, batches, compute_loss=compute_loss)
    torch.testing.assert_close(trained.losses, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(trained.state, dict(state), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_measured_is_predicted_under_a_budget_that_needs_tiles(workshop: Workshop, allocator: Allocator) -> None:
    smallest = smallest_nbytes(workshop, WIDE)
    weights = sum(parameter.nbytes for parameter in WIDE.build().parameters())
    workshop.capture(WIDE.build(), (), WIDE.batch(0) | {"use_cache": False})  # what it keeps is no part of the lab
    lab = Lab(allocator, WIDE, smallest * 1.1 / weights)
    steps = lab.sweeps(2)
    schedule = lab.model.schedule
    assert schedule is not None
    assert any(option.startswith("tiled") for step in schedule.steps for option in step.options)
    for step in steps:
        assert step.measured <= step.predicted <= lab.budget
        assert step.sweep == 0 or step.predicted <= 1.02 * step.measured


@pytest.mark.slow
def test_a_tiled_step_serves_a_shorter_batch_and_no_other_model(workshop: Workshop) -> None:
    model = compile_quickly(WIDE.build(), smallest_nbytes(workshop, WIDE) * 11 // 10)
    model.plan(**WIDE.batch(0))
    schedule, compiled = model.schedule, model._session.latest
    assert schedule is not None
    assert compiled is not None
    torch.autograd.backward(compute_loss(model, token_batch(rows=1, tokens=9)))  # offered no tiles, lowered in tiles
    assert model.schedule is schedule
    step = schedule.steps[0]
    assert compiled.offers(step)
    for options in (("tiled 2", *step.options[1:]), step.options[1:]):
        assert not compiled.offers(replace(step, options=options))


def test_logits_that_the_caller_keeps_are_not_tiled(workshop: Workshop) -> None:
    found = workshop.capture(llama().train(), (), token_batch() | {"use_cache": False}, loss_only=False)
    lowering = Lowering(found, cut(found))
    reason = lowering.untiled(lowering.segments[-1])
    assert reason is not None
    assert reason.startswith("the caller reads"), reason
