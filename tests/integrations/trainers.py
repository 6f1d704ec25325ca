"""Small runs under the Trainer of transformers, and the same runs as loops written by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import AdamW
from transformers import TrainingArguments

from chunkft_compile import ChunkedModule
from chunkft_compile.integrations.transformers import ChunkedTrainer
from tests.models import token_batch

PLENTY = 10**8


def rows(count: int = 24) -> Any:
    """A data set of single sequences, a list of dictionaries."""
    return [{name: ids[0] for name, ids in token_batch(seed, rows=1).items()} for seed in range(count)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Quiet ones for a few steps on the CPU, in the order of the data."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 7,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(folder), **(settings | changes))


def train(model: nn.Module, folder: Path, *, resume: Path | None = None, **changes: Any) -> Any:
    """The Trainer, after a run over `rows`."""
    trainer = ChunkedTrainer(model=model, args=arguments(folder, **changes), train_dataset=rows())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def decayed(model: ChunkedModule, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: norms and biases do not decay."""
    kept = [chunk.leaf for chunk in model.chunks if "norm" not in chunk.param and "bias" not in chunk.param]
    rest = [chunk.leaf for chunk in model.chunks if all(chunk.leaf is not leaf for leaf in kept)]
    return [{"params": kept, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def loop(model: ChunkedModule, *, steps: int = 7, micro: int = 1, weight_decay: float = 0.0, clip: float = 1.0) -> None:
    """What the Trainer does with `arguments`, in a loop over the same batches."""
    optimizer = AdamW(decayed(model, weight_decay), lr=1e-2, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    data = rows()
    batches = [{name: torch.stack([row[name] for row in data[i : i + 2]]) for name in data[0]} for i in range(0, len(data), 2)]
    for step in range(steps):
        taken = [batches[(step * micro + i) % len(batches)] for i in range(micro)]
        backwards(model, taken)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        model.zero_grad()


def backwards(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """One loss over all tokens of these batches, as the Trainer counts them: the first token of a row is no label."""
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) / torch.tensor(1)
    for batch in batches:
        torch.autograd.backward(model(**batch, num_items_in_batch=items).loss)


def same_weights(model: nn.Module, other: nn.Module, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Bit for bit, unless told otherwise."""
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=rtol, atol=atol)
