"""What the Trainer's arguments ask for in vain is refused by name, before anything is trained, with the way out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from chunkft_compile import TrainingError
from chunkft_compile.integrations.trainer_checks import refuse_arguments, refuse_for_model
from chunkft_compile.integrations.transformers import ChunkedTrainer
from tests.integrations.trainers import PLENTY, arguments, rows
from tests.invariants.harness import compile_quickly
from tests.models import compute_loss, llama, token_batch

pytestmark = pytest.mark.usefixtures("captures_once")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"torch_compile": True},
            r'torch_compile=True cannot .* programs of its own; compile\(..., backend="inductor"\)',
        ),
        (
            {"activation_checkpointing": True},
            r"activation_checkpointing=True .* is recomputed, .*; pass activation_checkpointing=False",
        ),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True .*`chunkft fit` names the largest batch"),
        ({"use_liger_kernel": True}, r"use_liger_kernel=True .* the plan tiles the head by itself"),
        ({"fp16_full_eval": True}, r"fp16_full_eval=True .* evaluate under autocast"),
        ({"bf16_full_eval": True}, r"bf16_full_eval=True .* evaluate under autocast"),
        ({"optim": "lomo"}, r'optim=\'lomo\' .*; compile\(..., update="immediate"\) does that with any optimizer'),
        ({"optim": "galore_adamw"}, r"optim='galore_adamw' .* project whole matrices .*; take adamw_torch"),
        ({"optim": "paged_adamw_8bit"}, r"optim='paged_adamw_8bit' .* move their state themselves; take the .* name without paged_"),
        ({"optim": "schedule_free_adamw"}, r"optim='schedule_free_adamw' .* rewrite all weights between training and evaluation"),
    ],
)
def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # torch_compile=True writes this and would leave it behind
    args = arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ChunkedTrainer(model=compile_quickly(llama(), PLENTY), args=args, train_dataset=rows())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "deepspeed",
            "ds.json",
            r"deepspeed='ds.json' cannot .*: it is planned for one device and holds its budget there",
        ),
        ("fsdp", True, r"fsdp=True cannot train a compiled model: it is planned for one device"),
        ("parallelism_config", "2 x 4", r"parallelism_config='2 x 4' cannot"),
        ("_n_gpu", 2, r"nn.DataParallel over 2 devices cannot .* show one, with CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_more_than_one_device(tmp_path: Path, name: str, value: Any, message: str) -> None:
    args = arguments(tmp_path)
    _ = args.device  # decides how many there are
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        refuse_arguments(args)


def test_more_than_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    with pytest.raises(ValueError, match=r"a launch of 4 processes cannot train a compiled model: it is planned for one device; start one"):
        refuse_arguments(arguments(tmp_path))


def test_every_other_optimizer_is_let_through(tmp_path: Path) -> None:
    """Whether it can train chunks is asked of the optimizer itself, when the plan is made."""
    refused = set()
    for optim in OptimizerNames:
        try:
            refuse_arguments(arguments(tmp_path, optim=optim))
        except ValueError:
            refused.add(optim.value)
    assert not {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "lion_32bit"} & refused
    assert {"lomo", "adalomo", "galore_adafactor_layerwise", "apollo_adamw", "paged_lion_8bit", "schedule_free_sgd"} < refused


@pytest.mark.parametrize("update", ["immediate", "auto"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"max_grad_norm=1 does not .* before the norm of all is known; pass max_grad_norm=0, or compile\(..., update=\"held\"\)"),
        (
            {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
            r"gradient_accumulation_steps=2 does not .* pass 1 with a larger per_device_train_batch_size",
        ),
        ({"max_grad_norm": 0.0, "fp16": True}, r"fp16=True does not .* before they are unscaled; take bf16"),
    ],
)
def test_updates_inside_backward(tmp_path: Path, update: Any, changes: dict[str, Any], message: str) -> None:
    model = compile_quickly(llama(), PLENTY, update=update)
    with pytest.raises(ValueError, match=message):
        ChunkedTrainer(model=model, args=arguments(tmp_path, **changes), train_dataset=rows())


def test_half_precision(tmp_path: Path) -> None:
    fp32, fp16, masters = (
        compile_quickly(llama().to(dtype), PLENTY, precision=precision)
        for dtype, precision in ((torch.float32, None), (torch.float16, None), (torch.float16, "master"))
    )
    half, scaler = arguments(tmp_path, fp16=True), object()
    with pytest.raises(ValueError, match=r"fp16=True does not .*: accelerate has no GradScaler for cpu, .*; pass bf16=True"):
        ChunkedTrainer(model=fp32, args=half, train_dataset=rows())
    with pytest.raises(ValueError, match=r"fp16=False does not .* gradients vanish unless the loss is scaled; load it in bfloat16"):
        refuse_for_model(arguments(tmp_path), fp16, scaler=None)
    with pytest.raises(ValueError, match=r'fp16=True does not .* which GradScaler cannot unscale; compile\(..., precision="master"\)'):
        refuse_for_model(half, fp16, scaler=scaler)
    refuse_for_model(half, masters, scaler=scaler)
    refuse_for_model(half, fp32, scaler=scaler)


def test_a_model_without_chunks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ChunkedTrainer trains what chunkft_compile.compile\(\) gave, and this is a LlamaForCausalLM"):
        ChunkedTrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows())


def test_parts_of_the_model_called_past_it(tmp_path: Path) -> None:
    """Nothing would be trained: the weights get the gradients and the optimizer has the chunks."""

    class Bypassing(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model.lm_head(model.base_model(inputs["input_ids"]).last_hidden_state).float().sum()

    model = compile_quickly(llama(), PLENTY)
    trainer = Bypassing(model=model, args=arguments(tmp_path), train_dataset=rows())
    with pytest.raises(TrainingError, match=r"model.embed_tokens.weight itself has a gradient, and no chunk has: a part of the model was"):
        trainer.train()


def test_a_step_with_no_gradient_anywhere_is_none() -> None:
    model = compile_quickly(llama(), PLENTY)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step()
    torch.autograd.backward(compute_loss(model, token_batch()))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert model.progress.sweep == 1
