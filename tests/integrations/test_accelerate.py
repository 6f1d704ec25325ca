"""Loops of accelerate train a compiled model as plain ones do."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import AdamW

from chunkft_compile import ChunkedModule
from chunkft_compile.planner import Update
from tests.integrations.trainers import PLENTY, same_weights
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import llama, token_batch

pytestmark = pytest.mark.usefixtures("captures_once")

BATCHES = [token_batch(seed) for seed in range(8)]


def _compiled(micro: int) -> ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(llama().train(), PLENTY, accumulation=micro > 1)


@pytest.mark.parametrize(("micro", "precision"), [(1, "no"), (2, "no"), (2, "bf16")])
def test_the_weights_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, micro: int, precision: Any) -> None:
    plan_by_hand(monkeypatch, (Update.HELD,) * 2)
    prepared, expected = _compiled(micro), _compiled(micro)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=micro)
    model, optimizer = accelerator.prepare(prepared, AdamW(prepared.parameters(), lr=1e-2))
    for batch in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    plain = AdamW(expected.parameters(), lr=1e-2)
    for number, batch in enumerate(BATCHES, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = expected(**batch).loss
        torch.autograd.backward(loss / micro)
        if number % micro == 0:
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
            plain.step()
            plain.zero_grad()
    assert prepared.progress == expected.progress
    assert prepared.progress.sweep == len(BATCHES) // micro // 2
    same_weights(prepared, expected)
    assert accelerator.unwrap_model(model) is prepared
