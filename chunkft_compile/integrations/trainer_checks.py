"""What the Trainer's arguments ask for that chunks cannot give, by name and with the way out; and runs that end too early."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainingArguments

from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Update
from chunkft_compile.runtime.precision import Precision

_SHOWN = 3

# first words of values of `optim`
_OPTIMIZERS = {
    "lomo": 'apply gradients themselves, in hooks of each parameter; compile(..., update="immediate") does that with any optimizer',
    "adalomo": 'apply gradients themselves, in hooks of each parameter; compile(..., update="immediate") does that with any optimizer',
    "galore": "project whole matrices that they find by their modules, and chunks are rows; take adamw_torch: the budget holds its state",
    "apollo": "project whole matrices that they find by their modules, and chunks are rows; take adamw_torch: the budget holds its state",
    "paged": "move their state themselves; take the optimizer of that name without paged_: the plan moves its state",
    "schedule_free": "rewrite all weights between training and evaluation from state that is in the store; take adamw_torch",
}


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that no compiled model can be trained with."""
    for setting, reason in _unsuitable(args):
        raise ValueError(f"{setting} cannot train a compiled model: {reason}")


def refuse_for_model(args: TrainingArguments, model: ChunkedModule, *, scaler: Any) -> None:
    """Raise `ValueError` for arguments that this model cannot be trained with. `scaler` is the `GradScaler`, if there is one."""
    for setting, reason in _unsuitable_for(args, model, scaler):
        raise ValueError(f"{setting} does not go with this compiled model: {reason}")


def _unsuitable(args: TrainingArguments) -> Iterator[tuple[str, str]]:
    """Settings as one writes them, each with the reason and the way out."""
    if args.torch_compile:
        yield "torch_compile=True", 'what it runs are programs of its own; compile(..., backend="inductor") compiles their codes'
    if args.activation_checkpointing:  # gradient_checkpointing is an alias of it
        reason = "the plan says for every segment and step what is saved and what is recomputed, as far as the budget asks for it"
        yield "activation_checkpointing=True", f"{reason}; pass activation_checkpointing=False (SFTConfig has it on by itself)"
    for name in ("deepspeed", "fsdp", "parallelism_config"):
        if getattr(args, name, None):
            yield f"{name}={getattr(args, name)!r}", "it is planned for one device and holds its budget there by itself; leave it out"
    if args.world_size > 1:
        yield f"a launch of {args.world_size} processes", "it is planned for one device; start one process"
    if args.n_gpu > 1:
        yield f"nn.DataParallel over {args.n_gpu} devices", "it is planned for one device; show one, with CUDA_VISIBLE_DEVICES=0"
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size=True",
            "it waits for memory to run out, and the plan holds the budget for the batch it is given; `chunkft fit` names the largest "
            "batch, and model.plan(**batch) raises BudgetError for one that is too large",
        )
    if args.use_liger_kernel:
        yield "use_liger_kernel=True", "no gradient of its kernels can be cut into rows; the plan tiles the head by itself"
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            yield f"{name}=True", "it casts the weights away from their chunks; evaluate under autocast (bf16=True), or as they are"
    optim = str(getattr(args.optim, "value", args.optim))
    for words, reason in _OPTIMIZERS.items():
        if optim.startswith(words):
            yield f"optim={optim!r}", f"such optimizers {reason}"


def _unsuitable_for(args: TrainingArguments, model: ChunkedModule, scaler: Any) -> Iterator[tuple[str, str]]:
    options = model._session.options
    if Update.IMMEDIATE in options.updates:
        update = "auto" if Update.HELD in options.updates else "immediate"
        applied = f'compile(..., update="{update}") applies gradients inside backward'
        if args.max_grad_norm > 0:
            yield (
                f"max_grad_norm={args.max_grad_norm:g}",
                f'{applied}, before the norm of all is known; pass max_grad_norm=0, or compile(..., update="held")',
            )
        if args.gradient_accumulation_steps > 1:
            yield (
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}",
                f"{applied}, before those of the next batch are added; pass 1 with a larger per_device_train_batch_size, or "
                f'compile(..., accumulation=True, update="held")',
            )
        if args.fp16:
            yield "fp16=True", f'{applied}, before they are unscaled; take bf16, or compile(..., update="held")'
    half = {chunk.weight.dtype for chunk in model.chunks} & {torch.float16}
    if args.fp16 and scaler is None:
        yield "fp16=True", f"accelerate has no GradScaler for {args.device}, and would train without autocast; pass bf16=True"
    if half and not args.fp16:
        yield (
            "fp16=False",
            "its weights are float16, whose gradients vanish unless the loss is scaled; load it in bfloat16 or float32",
        )
    if half and args.fp16 and options.precision is Precision.PLAIN:
        yield "fp16=True", 'its weights are float16, which GradScaler cannot unscale; compile(..., precision="master")'


def short_sweep(model: ChunkedModule, steps: int) -> str | None:
    """What to say where `steps` steps, the one under way among them, end before each chunk was trained once; None where they do not."""
    sweep = model._session.planned
    late = [number for step in sweep.state.steps[steps:] for number in step.chunks] if sweep.count == 0 else []
    if not late:
        return None
    names = list(dict.fromkeys(model.chunks[number].param for number in late))
    rows = sum(model.chunks[number].leaf.numel() for number in late) / sum(chunk.leaf.numel() for chunk in model.chunks)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    total = len(sweep.schedule.steps)
    return (
        f"training ends after {sweep.position + steps} of the {total} steps that one sweep takes: {rows:.0%} of the trainable elements "
        f"will never be trained, in {len(names)} parameters ({', '.join(names[:_SHOWN])}{more}). Train for a multiple of {total} steps, or "
        f'raise the budget; compile(..., prefer="fresh") plans for the fewest steps'
    )
