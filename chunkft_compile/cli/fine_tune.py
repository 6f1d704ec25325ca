"""One fine-tuning run from files to files. `chunkft train` and the demo both call `fine_tune`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chunkft_compile.budget import format_nbytes, parse_budget
from chunkft_compile.cli.keeping import Keeping
from chunkft_compile.cli.loop import LoopConfig, perplexity, train
from chunkft_compile.cli.memory import PeakWatch
from chunkft_compile.cli.options import pick_device
from chunkft_compile.cli.planned import PlanConfig, planned_model, say
from chunkft_compile.data import Example, Sequences, encode, read_examples, shuffled_batches, split
from chunkft_compile.planner import Plan, Update
from chunkft_compile.pretrained import check_model, check_out, load_tokenizer, save_model
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.solving import read_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# state that stays on the device is complete only after a whole sweep
MEASURED_SWEEPS = 2


@dataclass(frozen=True)
class TrainConfig:
    """A run, in the words of `chunkft train --help`. `steps` overrides `epochs`; `eval_data` overrides `eval_fraction`.

    `budget` may be None where there is a `schedule`, which has one. None for `update`, `prefer` and `precision` is "held", "time"
    and "plain".
    """

    model: Path
    data: Path
    budget: str | int | None
    out: Path
    eval_data: Path | None = None
    eval_fraction: float = 0.05
    eval_sequences: int = 64
    overwrite: bool = False
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 1
    seq: int = 512
    accumulate: int = 1
    lr: float = 2e-5
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str | None = None
    seed: int = 0
    solve_seconds: float = 5.0
    measure: bool = False
    schedule: Path | None = None
    update: str | None = None
    prefer: str | None = None
    max_steps: int | None = None
    checkpoint_every: int = 0
    resume: bool = False
    precision: str | None = None


@dataclass(frozen=True)
class TrainReport:
    """What came out. `plain_nbytes` is computed, `measured_nbytes` is None where nothing was measured, `perplexity_before` is None
    for a run that was resumed.
    """

    perplexity_before: float | None
    perplexity_after: float | None
    losses: tuple[float, ...]
    sweep_steps: int
    budget_nbytes: int
    predicted_nbytes: int
    measured_nbytes: int | None
    plain_nbytes: int
    train_s: float
    out: Path


@dataclass(frozen=True)
class _Files:
    """Everything that could be found wrong before a model is loaded, found right."""

    device: torch.device
    budget_nbytes: int
    schedule: Plan | None
    examples: list[Example]
    eval_examples: list[Example] | None


def fine_tune(config: TrainConfig) -> TrainReport:
    """Train, score before and after, save. Raises `ValueError` for bad input, `BudgetError` if no plan fits."""
    files = _check(config)
    tokenizer = load_tokenizer(config.model)
    data, held_out = _sequences(config, files, tokenizer)
    batches = shuffled_batches(data, config.batch, seed=config.seed)
    loop = _loop_config(config, files.budget_nbytes, len(data))
    torch.manual_seed(config.seed)
    model, plain_nbytes = _compile(config, files, loop.steps)

    before = None if config.resume else _score(model, held_out, files.device, config.batch, "before")
    ignore = [tensor for part in (data, held_out) if part is not None for tensor in (part.input_ids, part.labels)]
    measured_steps = min(loop.steps - 1, MEASURED_SWEEPS * len(model.schedule.steps)) if config.measure else 0
    watch = PeakWatch(
        files.device, measured_steps=measured_steps, weights=[*model.module.parameters(), *model.module.buffers()], ignore=ignore
    )
    planned, start = model.schedule, time.perf_counter()
    losses = train(model, batches, files.device, loop, watch, _keeping(config, loop, len(data)), resume=config.resume)
    seconds = time.perf_counter() - start
    after = _score(model, held_out, files.device, config.batch, "after")

    save_model(model, tokenizer, config.out)
    say(f"saved {config.out}")
    schedule = model.schedule or planned  # a run that was complete when it was stopped has trained nothing here
    sizes = (files.budget_nbytes, schedule.peak_nbytes, watch.peak_nbytes, plain_nbytes)
    return TrainReport(before, after, tuple(losses), len(schedule.steps), *sizes, seconds, config.out)


def _check(config: TrainConfig) -> _Files:
    device = pick_device(config.device)
    schedule = None if config.schedule is None else _read_schedule(config, config.schedule)
    budget = _budget_nbytes(config, device, schedule)
    _refuse_unheld(config, schedule)
    Precision(config.precision or Precision.PLAIN).check([config.dtype])
    examples = read_examples(config.data)
    eval_examples = None if config.eval_data is None else read_examples(config.eval_data)
    check_model(config.model)
    if config.out.resolve() == config.model.resolve():
        raise ValueError(f"output directory {config.out} is the model itself: pass another --out")
    check_out(config.out, overwrite=config.overwrite)
    return _Files(device, budget, schedule, examples, eval_examples)


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


def _sequences(config: TrainConfig, files: _Files, tokenizer: "PreTrainedTokenizerBase") -> tuple[Sequences, Sequences | None]:
    packed = config.data.suffix == ".txt"
    data = encode(files.examples, tokenizer, length=config.seq, packed=packed)
    held_out: Sequences | None
    if config.eval_data is not None and files.eval_examples is not None:
        scored = encode(files.eval_examples, tokenizer, length=config.seq, packed=config.eval_data.suffix == ".txt")
        train_data, held_out = data, scored.part(slice(config.eval_sequences))
    else:
        train_data, held_out = split(data, config.eval_fraction, most=config.eval_sequences, seed=None if packed else config.seed)
    say(f"data: {len(train_data)} sequences of {config.seq} tokens, {len(held_out or ())} held out")
    if data.dropped or data.cut:
        say(f"data: {data.dropped} examples dropped (no answer within {config.seq} tokens), {data.cut} cut to {config.seq} tokens")
    return train_data, held_out


def _loop_config(config: TrainConfig, budget_nbytes: int, sequences: int) -> LoopConfig:
    an_epoch = sequences // config.batch / config.accumulate
    steps = config.steps if config.steps is not None else max(1, int(config.epochs * an_epoch))
    warmup = config.warmup if config.warmup is not None else steps // 20
    if warmup >= steps:
        raise ValueError(f"--warmup {warmup} leaves none of the {steps} steps at the full learning rate: lower it")
    return LoopConfig(steps, config.accumulate, config.lr, warmup, config.weight_decay, config.clip, budget_nbytes)


def _keeping(config: TrainConfig, loop: LoopConfig, sequences: int) -> Keeping:
    """Checkpoints beside `--out`, and what must be the same where a run goes on."""
    choices = {"--steps": loop.steps, "--accumulate": loop.accumulate, "--lr": loop.lr, "--warmup": loop.warmup, "--clip": loop.clip}
    choices |= {"--weight-decay": loop.weight_decay, "--batch": config.batch, "--seq": config.seq, "--seed": config.seed}
    return Keeping(Keeping.beside(config.out), config.checkpoint_every, choices | {"sequences of data": sequences})


def _compile(config: TrainConfig, files: _Files, steps: int) -> tuple[Any, int]:
    """The compiled model, planned for the shape of every batch to come, and the peak of plain AdamW for the same."""
    planning = PlanConfig(
        config.model,
        files.budget_nbytes,
        files.device,
        config.dtype,
        config.batch,
        config.seq,
        config.accumulate,
        config.solve_seconds,
        config.seed,
        update=config.update or "held",
        prefer=config.prefer or "time",
        max_steps=config.max_steps,
        precision=config.precision,
        schedule=files.schedule,
    )
    model, plain_nbytes = planned_model(planning)
    sweep, peak = len(model.schedule.steps), format_nbytes(model.schedule.peak_nbytes)
    say(f"plan: {sweep} step{'s' if sweep > 1 else ''} a sweep, predicted peak {peak} of {format_nbytes(files.budget_nbytes)}")
    say(f"plan: plain AdamW needs {format_nbytes(plain_nbytes)} (computed)")
    if steps < sweep:
        say(f"note: {steps} steps do not complete a sweep of {sweep}; some parameters keep their values")
    return model, plain_nbytes


def _score(model: Any, held_out: Sequences | None, device: torch.device, batch: int, when: str) -> float | None:
    if held_out is None:
        return None
    score = perplexity(model, held_out, device, batch=batch, when=when)
    say(f"held-out perplexity {when}: {score:.2f}")
    return score
