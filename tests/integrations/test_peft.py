"""Adapters of PEFT inside a compiled model, under the Trainer."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from chunkft_compile.integrations.transformers import ChunkedTrainer
from chunkft_compile.planner import Update
from tests.integrations.trainers import PLENTY, arguments, rows, same_weights, train
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import llama

pytestmark = [
    pytest.mark.usefixtures("captures_once"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # asked by peft (0.21) itself
]


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    base: Any = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).train()


def test_adapters_train_are_kept_and_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (Update.HELD,) * 2)
    whole, resumed = compile_quickly(_adapted(), PLENTY), compile_quickly(_adapted(), PLENTY)
    start = {name: weight.clone() for name, weight in whole.state_dict().items()}
    train(whole, tmp_path, max_steps=5, save_strategy="steps", save_steps=3)
    changed = {name for name, weight in whole.state_dict().items() if not torch.equal(weight, start[name])}
    assert changed == {name for name in start if "lora" in name}
    assert {"adapter_model.safetensors", "chunkft"} <= {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    train(resumed, tmp_path, max_steps=5, resume=tmp_path / "checkpoint-3")
    same_weights(resumed, whole)
    assert resumed.progress == whole.progress


def test_labels_are_those_of_the_model_inside(tmp_path: Path) -> None:
    trainer = ChunkedTrainer(model=compile_quickly(_adapted(), PLENTY), args=arguments(tmp_path), eval_dataset=rows(2))
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] > 0
