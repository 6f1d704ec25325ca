"""Everything about a `chunkft train` run that can be found wrong before a tokenizer or a model is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from chunkft_compile.budget import parse_budget
from chunkft_compile.cli.config import TrainConfig
from chunkft_compile.cli.keeping import checkpoints_of, latest_of
from chunkft_compile.cli.options import DTYPES, pick_device
from chunkft_compile.cli.tensorboard import check_tensorboard
from chunkft_compile.data import Chat, Example, read_examples
from chunkft_compile.planner import Plan, Update
from chunkft_compile.pretrained import check_model, check_out
from chunkft_compile.runtime.modelled_optimizers import make_optimizer
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.solving import read_plan
from chunkft_compile.writing import check_target


@dataclass(frozen=True)
class Files:
    """What a run starts from, found right. `template` is the text of the chat template, None for the tokenizer's own."""

    device: torch.device
    budget_nbytes: int
    schedule: Plan | None
    examples: list[Example | Chat]
    eval_examples: list[Example | Chat] | None
    template: str | None


def check(config: TrainConfig) -> Files:
    """Read what is small. Raises `ValueError` for bad input; nothing is written."""
    device = pick_device(config.device)
    schedule = None if config.schedule is None else _read_schedule(config, config.schedule)
    budget = _budget_nbytes(config, device, schedule)
    _refuse_unheld(config, schedule)
    Precision(config.precision or Precision.PLAIN).check([DTYPES[config.dtype]])
    if config.optimizer is not None:
        make_optimizer(config.optimizer, [nn.Parameter(torch.zeros(2, device=device))])
    examples = read_examples(config.data)
    eval_examples = None if config.eval_data is None else read_examples(config.eval_data)
    if config.packing and config.data.suffix == ".txt":
        raise ValueError(f"--packing is for the examples of a .jsonl; {config.data} is text, whose sequences are full as they are")
    template = _read_template(config, [*examples, *(eval_examples or ())])
    check_model(config.model)
    _check_outputs(config)
    if config.resume:
        latest_of(config.out)
    return Files(device, budget, schedule, examples, eval_examples, template)


def _read_schedule(config: TrainConfig, path: Path) -> Plan:
    """The kept plan. Raises `ValueError` for one that cannot be read, and for choices that were made when it was planned."""
    given = {"--update": config.update, "--prefer": config.prefer, "--max-steps": config.max_steps, "--precision": config.precision}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise ValueError(f"--schedule {path} was planned already: leave {wrong[0]} out, or give it to chunkft plan --json")
    schedule = read_plan(path)
    if not schedule.lowered:
        raise ValueError(
            f"--schedule {path} was planned for {schedule.fingerprint.device}, a device that was not here: "
            f"plan on the device to train on (chunkft plan MODEL --budget ... --json FILE)"
        )
    return schedule


def _budget_nbytes(config: TrainConfig, device: torch.device, schedule: Plan | None) -> int:
    """The budget given, that of the schedule, or both where they agree."""
    if schedule is None:
        if config.budget is None:
            raise ValueError(f'--budget is needed: memory on {device}, as "14GB"; or a --schedule that has one')
        return parse_budget(config.budget, device)
    planned = schedule.schedule.budget_nbytes
    if config.budget is not None and parse_budget(config.budget, device) != planned:
        raise ValueError(
            f"--budget {config.budget} is not that of --schedule {config.schedule}, {planned}B: leave --budget out, or plan for it"
        )
    return planned


def _refuse_unheld(config: TrainConfig, schedule: Plan | None) -> None:
    """Clipping and accumulation need gradients that are held; where some may be applied inside backward, say so before training."""
    if schedule is not None and any(step.update is Update.IMMEDIATE for step in schedule.schedule.steps):
        what, otherwise = f"--schedule {config.schedule} has IMMEDIATE updates, which apply", "plan with --update held"
    elif config.update in ("auto", "immediate"):
        what, otherwise = f"--update {config.update} may apply", "--update held"
    else:
        return
    if config.clip:
        raise ValueError(
            f"{what} each gradient inside backward, before the norm of all is known, and --clip {config.clip:g} needs it: "
            f"pass --clip 0, or {otherwise}"
        )
    if config.accumulate > 1:
        raise ValueError(
            f"{what} each gradient inside backward, and --accumulate {config.accumulate} adds them up over batches: "
            f"leave it out (a larger --batch does the same), or {otherwise}"
        )


def _read_template(config: TrainConfig, examples: list[Example | Chat]) -> str | None:
    path = config.chat_template
    if path is None:
        return None
    if not any(isinstance(example, Chat) for example in examples):
        raise ValueError(f"--chat-template {path} is for rows with `messages`, and {config.data} has none: leave it out")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise ValueError(f"--chat-template {path} is empty")
    return text


def _check_outputs(config: TrainConfig) -> None:
    if config.out.name in ("", ".."):
        raise ValueError(f"--out {config.out} has no name of its own: pass a directory that is to be made")
    if config.out.resolve() == config.model.resolve():
        raise ValueError(f"output directory {config.out} is the model itself: pass another --out")
    check_out(config.out, overwrite=config.overwrite)
    checkpoints = checkpoints_of(config.out)
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ValueError(f"checkpoints of --out {config.out} cannot be written: {checkpoints} is not a directory")
    if config.plan_json is not None:
        check_target(config.plan_json, "--plan-json")
    if config.record is not None:
        check_target(config.record, "--record")
        if config.record.exists():
            raise ValueError(f"--record {config.record} is there already, and may be another run: name another file, or remove it")
    if config.tensorboard is not None:
        check_tensorboard(config.tensorboard)
