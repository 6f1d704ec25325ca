"""One fine-tuning run from files to files. `chunkft train` and the demo both call `fine_tune`."""

import contextlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.checking import Files, check
from chunkft_compile.cli.config import TrainConfig
from chunkft_compile.cli.configuring import to_plain
from chunkft_compile.cli.evaluating import Evaluation, Score, mean_loss
from chunkft_compile.cli.events import Evaluated, Planned, Saved, Stopped
from chunkft_compile.cli.keeping import Keeping
from chunkft_compile.cli.listeners import Bar, JsonLines, Listener, Listeners, Tell
from chunkft_compile.cli.loop import LoopConfig, StopRun, Training
from chunkft_compile.cli.memory import PeakWatch
from chunkft_compile.cli.options import DTYPES
from chunkft_compile.cli.planned import PlanConfig, planned_model, say
from chunkft_compile.cli.stopping import Interrupted, Stop
from chunkft_compile.cli.tensorboard import TensorBoard
from chunkft_compile.packing import pack
from chunkft_compile.planner import Schedule
from chunkft_compile.pretrained import load_tokenizer, replace_directory, save_model
from chunkft_compile.recording import record
from chunkft_compile.sequences import Sequences, encode, pad, shuffled_batches, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TrainConfig", "TrainReport", "dry_run", "fine_tune"]

# state that stays on the device is complete only after a whole sweep
MEASURED_SWEEPS = 2


@dataclass(frozen=True)
class TrainReport:
    """What came out. `plain_nbytes` is computed, `measured_nbytes` is None where nothing was measured, `perplexity_before` is None
    for a run that was resumed. With `keep_best`, `perplexity_after` is that of the model that was saved.
    """

    perplexity_before: float | None
    perplexity_after: float | None
    losses: tuple[float, ...]
    scores: tuple[Score, ...]
    sweep_steps: int
    budget_nbytes: int
    predicted_nbytes: int
    measured_nbytes: int | None
    plain_nbytes: int
    train_s: float
    out: Path


@dataclass(frozen=True)
class _Run:
    """Everything but the model."""

    config: TrainConfig
    files: Files
    tokenizer: "PreTrainedTokenizerBase"
    data: Sequences
    held_out: Sequences | None
    loop: LoopConfig


def fine_tune(config: TrainConfig, *, command: Sequence[str] | None = None) -> TrainReport:
    """Train, score before and after, save. `command` is the one that was typed, to tell how an interrupted run goes on.

    Raises `ValueError` for bad input, `BudgetError` if no plan fits, and `Interrupted` after a signal, with what is kept.
    """
    run = _prepare(config)
    with Listeners(_listeners(config)) as tell:
        model, plain_nbytes = _compile(run)
        training, schedule = Training(model, run.files.device, run.loop, _keeping(run, model)), model.schedule
        if config.resume:
            training.go_on()
            schedule = model.schedule or schedule  # a run that was complete when it was stopped trains nothing here
        tell(_planned(run, schedule, plain_nbytes, training.history.step))
        before = None if config.resume else _score(run, model, "before", 0, tell)
        watch, start = _watch(run, model), time.perf_counter()
        with Stop() as stop, _telling_how_to_go_on(training, tell, stop, command):
            with _recorded(config, training):
                batches = shuffled_batches(run.data, config.batch, seed=config.seed)
                training.run(batches, watch, _evaluation(run, model, stop), tell, stop)
            seconds = time.perf_counter() - start
            after = _after(run, training, tell, stop)
            _save(run, training)
        tell(Saved(step=training.history.step, path=str(config.out), perplexity_before=before, perplexity_after=after))
    say(f"saved {config.out}")
    history, sizes = training.history, (run.files.budget_nbytes, schedule.peak_nbytes, watch.peak_nbytes, plain_nbytes)
    return TrainReport(before, after, tuple(history.losses), tuple(history.scores), len(schedule.steps), *sizes, seconds, config.out)


def dry_run(config: TrainConfig) -> None:
    """Plan and report, without training; of all files, only that of `plan_json` is written. Raises as `fine_tune`."""
    run = _prepare(config)
    with Listeners([JsonLines()] if config.json else []) as tell:
        model, plain_nbytes = _compile(run)
        tell(_planned(run, model.schedule, plain_nbytes, 0))


def _listeners(config: TrainConfig) -> list[Listener]:
    """Whatever else is to watch each step is added here."""
    listeners: list[Listener] = [Bar()]
    if config.json:
        listeners.append(JsonLines())
    if config.tensorboard is not None:
        listeners.append(TensorBoard(config.tensorboard))
    return listeners


def _prepare(config: TrainConfig) -> _Run:
    files = check(config)
    tokenizer = load_tokenizer(config.model)
    if files.template is not None:
        tokenizer.chat_template = files.template
    data, held_out = _sequences(config, files, tokenizer)
    shuffled_batches(data, config.batch, seed=config.seed)  # raises where there are too few for one
    loop = _loop_config(config, len(data))
    torch.manual_seed(config.seed)
    return _Run(config, files, tokenizer, data, held_out, loop)


def _sequences(config: TrainConfig, files: Files, tokenizer: "PreTrainedTokenizerBase") -> tuple[Sequences, Sequences | None]:
    stream = config.data.suffix == ".txt"
    encoded = encode(files.examples, tokenizer, length=config.seq, stream=stream)
    rows, filler = encoded.rows, encoded.filler
    if config.eval_data is not None and files.eval_examples is not None:
        scored = encode(files.eval_examples, tokenizer, length=config.seq, stream=config.eval_data.suffix == ".txt")
        held = scored.rows[: config.eval_sequences]
    else:
        rows, held = split(rows, config.eval_fraction, most=config.eval_sequences, seed=None if stream else config.seed)
    data = (pack if config.packing else pad)(rows, config.seq, filler)
    packed = f" ({len(rows)} examples, packed)" if config.packing else ""
    say(f"data: {len(data)} sequences of {config.seq} tokens{packed}, {len(held)} held out")
    if encoded.dropped or encoded.cut:
        say(f"data: {encoded.dropped} examples dropped (no answer within {config.seq} tokens), {encoded.cut} cut to {config.seq} tokens")
    return data, pad(held, config.seq, filler) if held else None


def _loop_config(config: TrainConfig, sequences: int) -> LoopConfig:
    epoch_steps = sequences // config.batch / config.accumulate
    epochs = 1.0 if config.epochs is None else config.epochs
    steps = config.steps if config.steps is not None else max(1, int(epochs * epoch_steps))
    warmup = config.warmup if config.warmup is not None else steps // 20
    if warmup >= steps:
        raise ValueError(f"--warmup {warmup} leaves none of the {steps} steps at the full learning rate: lower it")
    return LoopConfig(
        steps,
        config.accumulate,
        config.lr,
        warmup,
        config.weight_decay,
        config.clip,
        config.lr_schedule,
        config.optimizer,
        epoch_steps,
    )


def _keeping(run: _Run, model: Any) -> Keeping:
    """Checkpoints beside `--out`, and what must be the same where a run goes on."""
    config, loop = run.config, run.loop
    choices: dict[str, Any] = {
        "--steps": loop.steps,
        "--accumulate": loop.accumulate,
        "--lr": loop.lr,
        "--warmup": loop.warmup,
        "--clip": loop.clip,
    }
    choices |= {"--lr-schedule": loop.lr_schedule, "--optimizer": loop.optimizer, "--weight-decay": loop.weight_decay}
    choices |= {"--batch": config.batch, "--seq": config.seq, "--seed": config.seed}
    choices |= {"--eval-every": config.eval_every, "--patience": config.patience, "--keep-best": config.keep_best}
    choices |= {
        "digest of the data": run.data.digest(),
        "digest of what is held out": None if run.held_out is None else run.held_out.digest(),
    }
    save_best = partial(save_model, model, run.tokenizer) if config.keep_best else None
    return Keeping(config.out, config.checkpoint_every, config.keep, choices, save_best)


def _compile(run: _Run) -> tuple[Any, int]:
    """The compiled model, planned for the shape of every batch to come, and the peak of plain training for the same."""
    config, files = run.config, run.files
    planning = PlanConfig(
        config.model,
        files.budget_nbytes,
        files.device,
        DTYPES[config.dtype],
        config.batch,
        config.seq,
        config.accumulate,
        config.seconds,
        config.seed,
        config.optimizer,
        update=config.update or "held",
        prefer=config.prefer or "time",
        max_steps=config.max_steps,
        precision=config.precision,
        schedule=files.schedule,
        weight_decay=config.weight_decay,
        packing=config.packing,
    )
    model, plain_nbytes = planned_model(planning)
    sweep, peak = len(model.schedule.steps), format_nbytes(model.schedule.peak_nbytes)
    say(f"plan: {sweep} step{'s' if sweep > 1 else ''} a sweep, predicted peak {peak} of {format_nbytes(files.budget_nbytes)}")
    say(f"plan: plain {config.optimizer or 'AdamW'} needs {format_nbytes(plain_nbytes)} (computed)")
    if run.loop.steps < sweep:
        say(f"note: {run.loop.steps} steps do not complete a sweep of {sweep}; some parameters keep their values")
    if config.plan_json is not None:
        model.save_schedule(config.plan_json)
        say(f"wrote {config.plan_json}")
    return model, plain_nbytes


def _planned(run: _Run, schedule: Schedule, plain_nbytes: int, step: int) -> Planned:
    return Planned(
        budget_nbytes=run.files.budget_nbytes,
        predicted_nbytes=schedule.peak_nbytes,
        plain_nbytes=plain_nbytes,
        sweep_steps=len(schedule.steps),
        step=step,
        steps=run.loop.steps,
        sequences=len(run.data),
        held_out=len(run.held_out or ()),
        config=to_plain(run.config),
    )


def _watch(run: _Run, model: Any) -> PeakWatch:
    measured_steps = min(run.loop.steps - 1, MEASURED_SWEEPS * len(model.schedule.steps)) if run.config.measure and model.schedule else 0
    ignore = [tensor for part in (run.data, run.held_out) if part is not None for tensor in part.tensors.values()]
    return PeakWatch(run.files.device, measured_steps=measured_steps, ignore=ignore)


def _evaluation(run: _Run, model: Any, stop: Stop) -> Evaluation:
    def score(step: int) -> Score | None:
        loss = _mean_loss(run, model, f"step {step}", lambda: stop.asked)
        return None if loss is None else Score(step, loss)

    return Evaluation(score, run.config.eval_every, run.config.patience, run.loop.steps)


def _mean_loss(run: _Run, model: Any, when: str, stopped: Callable[[], object] = lambda: None) -> float | None:
    assert run.held_out is not None, "there is something to score"
    return mean_loss(model, run.held_out, run.files.device, batch=run.config.batch, what=f"held-out {when}", stopped=stopped)


def _score(run: _Run, model: Any, when: str, step: int, tell: Tell, stopped: Callable[[], object] = lambda: None) -> float | None:
    """The perplexity of what is held out; None where nothing is, and if `stopped()` meanwhile."""
    loss = None if run.held_out is None else _mean_loss(run, model, when, stopped)
    if loss is None:
        return None
    score = Score(step, loss)
    tell(Evaluated(step=step, loss=loss, perplexity=score.perplexity))
    say(f"held-out perplexity {when}: {score.perplexity:.2f}")
    return score.perplexity


def _after(run: _Run, training: Training, tell: Tell, stop: Stop) -> float | None:
    """The score of the model that is to be saved. Raises `StopRun` if asked to stop meanwhile."""
    history = training.history
    if history.step < run.loop.steps:
        tell(Stopped(reason="patience", step=history.step))
        say(f"stopped after step {history.step}: {history.without_best} evaluations in a row were no better than the best")
    if not history.scores:
        after = _score(run, training.model, "after", history.step, tell, lambda: stop.asked)
        if stop.asked:
            raise StopRun(training.keep(tell))
        return after
    saved = history.best if run.config.keep_best else history.scores[-1]
    assert saved is not None, "there are scores"
    say(f"held-out perplexity after: {saved.perplexity:.2f} (step {saved.step})")
    return saved.perplexity


@contextlib.contextmanager
def _recorded(config: TrainConfig, training: Training) -> Iterator[None]:
    """What the steps inside take is written down, where that is wanted."""
    if config.record is None:
        yield
        return
    with record(training.model, config.record) as recording:
        training.note_loss = recording.note_loss
        yield


def _save(run: _Run, training: Training) -> None:
    if not run.config.keep_best:
        save_model(training.model, run.tokenizer, run.config.out)
        return
    best = training.keeping.best
    if not (best / "config.json").is_file():
        raise ValueError(f"the best model is no longer in {best}: run again without --resume")
    with replace_directory(run.config.out) as directory:
        shutil.copytree(best, directory, dirs_exist_ok=True)


@contextlib.contextmanager
def _telling_how_to_go_on(training: Training, tell: Tell, stop: Stop, command: Sequence[str] | None) -> Iterator[None]:
    """Whatever ends a run, there is a line on what is kept of it and how to go on."""
    how = "the same with resume=True" if command is None else shlex.join([*command, *(["--resume"] if "--resume" not in command else [])])
    try:
        yield
    except StopRun as stopped:
        assert stop.asked is not None, "the loop stops if it is asked to"
        step, path = training.history.step, str(stopped.checkpoint)
        tell(Stopped(reason=stop.asked.name, step=step, checkpoint=path, command=None if command is None else how))
        raise Interrupted(stop.asked, f"stopped after step {step}, everything is kept in {path}; go on with: {how}") from None
    except KeyboardInterrupt as error:
        kept = "" if training.kept is None else f"; the checkpoint of step {training.kept[0]} is complete, go on with: {how}"
        raise Interrupted.of(error, f"interrupted; no model was saved{kept}") from None
    except Exception as error:
        if training.kept is not None:
            error.add_note(f"the checkpoint of step {training.kept[0]} is complete; go on with: {how}")
        raise
