"""An encoder-decoder under `Seq2SeqTrainer`: loss, generation in evaluation, and going on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from chunkft_compile.integrations.transformers import ChunkedSeq2SeqTrainer
from chunkft_compile.planner import Update
from tests.integrations.trainers import PLENTY, arguments, rows, same_weights
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import VOCABULARY

pytestmark = pytest.mark.usefixtures("captures_once")


def _t5() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0}
    model: nn.Module = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    return model.train()


def _arguments(folder: Path, **changes: Any) -> Seq2SeqTrainingArguments:
    plain = {key: value for key, value in arguments(folder).to_dict().items() if not key.startswith("gradient_checkpointing")}
    return Seq2SeqTrainingArguments(**(plain | {"max_steps": 3, "predict_with_generate": True, "generation_max_length": 6} | changes))


def test_it_trains_generates_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (Update.HELD,) * 2)
    whole, resumed = compile_quickly(_t5(), PLENTY), compile_quickly(_t5(), PLENTY)
    args = _arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = ChunkedSeq2SeqTrainer(model=whole, args=args, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    plain = Seq2SeqTrainer(model=whole.module, args=args, eval_dataset=rows(4))
    found, expected = (np.asarray(one.predict(rows(4)).predictions) for one in (trainer, plain))
    assert (found > 0).any()
    assert np.array_equal(found, expected)
    again = ChunkedSeq2SeqTrainer(model=resumed, args=args, train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same_weights(resumed, whole)
