"""TRL's SFTTrainer trains a compiled model to the losses and weights that it gives a plain one."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from chunkft_compile import TrainingError
from chunkft_compile.integrations.trl import ChunkedSFTTrainer
from chunkft_compile.planner import Update
from tests.integrations.trainers import PLENTY, arguments, same_weights
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import VOCABULARY, llama

pytestmark = pytest.mark.usefixtures("captures_once")

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))]


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    whole = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **marks)


def _examples(count: int = 16) -> datasets.Dataset:
    """Prompts of three words and answers of four: one length, so that one capture is enough."""
    generator = torch.Generator().manual_seed(0)
    texts = [[WORDS[i] for i in torch.randint(3, VOCABULARY, (7,), generator=generator)] for _ in range(count)]
    return datasets.Dataset.from_list([{"prompt": " ".join(text[:3]), "completion": " " + " ".join(text[3:])} for text in texts])


def _config(folder: Path, **changes: Any) -> SFTConfig:
    plain = arguments(folder).to_dict()
    kept = ("output_dir", "per_device_train_batch_size", "learning_rate", "logging_steps", "report_to", "use_cpu", "disable_tqdm")
    settings = {key: plain[key] for key in kept} | {"max_steps": 4, "bf16": False, "activation_checkpointing": False}
    return SFTConfig(**(settings | {"dataloader_pin_memory": False, "save_strategy": "no"} | changes))


def _sft(kind: type[SFTTrainer], model: Any, args: SFTConfig, *, resume: Path | None = None, **settings: Any) -> SFTTrainer:
    data = _examples()
    trainer = kind(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(2)), processing_class=_tokenizer(), **settings
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return llama().train()


def test_the_losses_and_weights_of_trl(tmp_path: Path) -> None:
    model, plain = compile_quickly(_plain(), PLENTY, accumulation=True), _plain()
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    mine = _sft(ChunkedSFTTrainer, model, _config(tmp_path, **changes))
    theirs = _sft(SFTTrainer, plain, _config(tmp_path, **changes))
    for key in ("loss", "grad_norm", "eval_loss"):
        found, expected = ([entry[key] for entry in one.state.log_history if key in entry] for one in (mine, theirs))
        assert len(found) == (1 if key == "eval_loss" else 4)
        assert found == pytest.approx(expected, rel=1e-5)
    same_weights(model, plain, rtol=1e-4, atol=1e-6)
    assert "chunkft/sweep" in mine.state.log_history[0]


def test_it_goes_on_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, (Update.HELD,) * 3)
    whole, resumed = compile_quickly(_plain(), PLENTY), compile_quickly(_plain(), PLENTY)
    args = _config(tmp_path, save_strategy="steps", save_steps=2)
    _sft(ChunkedSFTTrainer, whole, args)
    _sft(ChunkedSFTTrainer, resumed, args, resume=tmp_path / "checkpoint-2")
    same_weights(whole, resumed)
    assert whole.progress == resumed.progress


def test_what_needs_the_probability_of_every_token_is_refused(tmp_path: Path) -> None:
    model = compile_quickly(_plain(), PLENTY)
    with pytest.raises(ValueError, match=r"loss_type='dft' cannot train a compiled model: the loss is its own cross entropy; pass \"nll\""):
        _sft(ChunkedSFTTrainer, model, _config(tmp_path, loss_type="dft"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default (1.16)
def test_checkpointing_that_trl_has_on_by_itself_is_refused(tmp_path: Path) -> None:
    model = compile_quickly(_plain(), PLENTY)
    with pytest.raises(ValueError, match=r"pass activation_checkpointing=False \(SFTConfig has it on by itself\)"):
        _sft(ChunkedSFTTrainer, model, SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]))


def test_the_plain_sft_trainer_goes_past_the_compiled_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no chunk has: .* \(TRL's SFTTrainer does not: take chunkft_compile.integrations.trl\)"):
        _sft(SFTTrainer, compile_quickly(_plain(), PLENTY), _config(tmp_path))
