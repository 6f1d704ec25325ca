"""The option "offload": not a bit of difference to "inputs", fewer bytes, predicted to the byte, and a store that does not grow."""

import functools
from functools import partial

import pytest
import torch
from torch.optim import AdamW

from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, train_sweeps
from tests.invariants.test_immediate import SCALARS
from tests.invariants.test_memory import Lab, StepMemory
from tests.models import Case, bert, class_batch, gpt2, llama, token_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

# Three blocks and long batches, so that what waits between forward and backward is a good part of the peak.
_LONG = {"rows": 8, "tokens": 32}
CASES = (
    Case("llama", functools.partial(llama, num_hidden_layers=3), functools.partial(token_batch, **_LONG)),
    Case("gpt2 with dropout", functools.partial(gpt2, n_layer=3, dropout=0.1), functools.partial(token_batch, **_LONG)),
    Case("bert", functools.partial(bert, num_hidden_layers=3), functools.partial(class_batch, **_LONG)),
)
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


@pytest.mark.parametrize(
    "updates", [pytest.param([HELD, HELD], id="held", marks=pytest.mark.slow), pytest.param([IMMEDIATE, HELD], id="both")]
)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=() if case is CASES[0] else pytest.mark.slow) for case in CASES])
def test_weights_are_bit_for_bit_the_same(monkeypatch: pytest.MonkeyPatch, case: Case, updates: list[Update]) -> None:
    found = []
    for option in ("inputs", "offload"):
        plan_by_hand(monkeypatch, updates, option=option)
        torch.manual_seed(0)
        model = compile_quickly(case.build(), 10**7, update="auto")
        found.append(train_sweeps(case, model, AdamW(model.parameters(), lr=1e-2), sweeps=2, micro=1))
    assert found[0].losses == found[1].losses
    torch.testing.assert_close(found[0].state, found[1].state, rtol=0, atol=0)


def _second_sweep(hook: Allocator, case: Case, option: str) -> StepMemory:
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, [IMMEDIATE], option=option)
        lab = Lab(hook, case, 40.0, make=partial(AdamW, lr=1e-3, fused=True), update="auto")
        first, second = lab.sweeps(2)
        assert first.measured <= first.predicted
        stored, schedule = lab.model.store_nbytes, lab.model.schedule
        lab.sweeps(1)
        assert lab.model.store_nbytes == stored
        assert lab.model.schedule is schedule, "a step with this option was not taken for one that this signature has"
    return second


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_is_predicted_and_lower(allocator: Allocator, workshop: Workshop, case: Case) -> None:
    workshop.capture(case.build(), (), case.batch(0) | ({} if case.name == "bert" else {"use_cache": False}))
    offloaded, kept = _second_sweep(allocator, case, "offload"), _second_sweep(allocator, case, "inputs")
    for step in (offloaded, kept):
        assert 0 <= step.predicted - step.measured <= SCALARS
    stream = 8 * 32 * 16 * 4
    assert kept.measured - offloaded.measured >= stream


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_planner_is_offered_what_a_step_then_does(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    plan_by_hand(monkeypatch, [HELD], option="offload")
    model = compile_quickly(case.build(), 10**7)
    model.plan(**case.batch(0))
    problem = model.problem
    assert problem is not None
    offered = 0
    for segment in problem.segments:
        kind = problem.kinds[segment.kind]
        assert [cost.option for cost in kind.frozen] == ["save"]
        for role in (kind.passing, kind.active, kind.last):
            by_name = {cost.option: cost for cost in role}
            if "offload" in by_name:
                offered += 1
                away = by_name["offload"]
                assert away.offloaded_nbytes > 0
                if "inputs" in by_name:
                    kept = by_name["inputs"]
                    assert away.saved_nbytes + away.offloaded_nbytes == kept.saved_nbytes
                    assert (away.backward_peak_nbytes, away.backward_us) == (kept.backward_peak_nbytes, kept.backward_us)
    assert offered >= 3
