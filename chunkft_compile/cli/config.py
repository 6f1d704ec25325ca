"""What `chunkft train` can be told: flags, keys of --config files, defaults and help texts are all made from `TrainConfig`."""

import math
from dataclasses import dataclass
from pathlib import Path

from chunkft_compile.cli import choices, options
from chunkft_compile.cli.configuring import check_fields, chosen
from chunkft_compile.cli.options import Option, at_least, between
from chunkft_compile.cli.rates import SHAPES

INSTEAD = (("epochs", "steps"),)
"""Pairs of which only one can be chosen."""

_DATA, _TRAINING, _EVALUATION, _CHECKPOINTS, _REPORTS = "data", "training", "evaluation", "checkpoints", "reports"
_POSITIVE, _NOT_NEGATIVE = between(0, math.inf), between(0, math.inf, included=True)


@dataclass(frozen=True)
class TrainConfig:
    """A run, in the words of `chunkft train --help`. Raises `ValueError` for a value that is out of range, or that contradicts another.

    `budget` may be None where there is a `schedule`, which has one. None for `update`, `prefer` and `precision` is "held", "time"
    and "plain", for `optimizer` AdamW, for both of `epochs` and `steps` one epoch. `eval_data` overrides `eval_fraction`.
    """

    model: Path = chosen(options.MODEL)
    data: Path = chosen(Option(".txt or .jsonl to train on", parse=Path, metavar="FILE", required=True, title=_DATA))
    out: Path = chosen(Option("directory for the fine-tuned model", parse=Path, metavar="DIR", required=True, title=_DATA))
    overwrite: bool = chosen(Option("replace the model in --out", False, title=_DATA))
    chat_template: Path | None = chosen(
        Option(
            "Jinja template for `messages`, instead of the tokenizer's; it is saved with the model",
            parse=Path,
            metavar="FILE",
            title=_DATA,
        )
    )
    packing: bool = chosen(
        Option("several examples of a .jsonl in one sequence, none of which sees another, instead of one and padding", False, title=_DATA)
    )

    budget: str | None = chosen(options.BUDGET)
    schedule: Path | None = chosen(
        Option(
            "run this plan, which chunkft plan --json or --plan-json wrote, under its own budget",
            parse=Path,
            metavar="FILE",
            title="memory",
        )
    )
    device: str | None = chosen(options.DEVICE)
    dtype: str = chosen(options.DTYPE)
    precision: str | None = chosen(choices.PRECISION)
    update: str | None = chosen(choices.UPDATE)
    prefer: str | None = chosen(choices.PREFER)
    max_steps: int | None = chosen(choices.MAX_STEPS)
    seconds: float = chosen(options.SECONDS)
    measure: bool = chosen(
        Option(
            "on a CPU, measure the peak of two sweeps: exactly where there is a C++ compiler, else with torch's profiler",
            False,
            title="memory",
        )
    )

    epochs: float | None = chosen(Option("passes over the data (default: 1)", None, _POSITIVE, "E", title=_TRAINING))
    steps: int | None = chosen(Option("optimizer steps, instead of --epochs", None, at_least(1), "N", title=_TRAINING))
    batch: int = chosen(options.BATCH)
    seq: int = chosen(options.SEQ)
    accumulate: int = chosen(options.ACCUMULATE)
    optimizer: str | None = chosen(choices.OPTIMIZER)
    lr: float = chosen(Option("highest learning rate", 2e-5, _POSITIVE, title=_TRAINING))
    lr_schedule: str = chosen(Option("what the learning rate does after the warmup", "cosine", choices=SHAPES, title=_TRAINING))
    warmup: int | None = chosen(
        Option("steps until the highest rate is reached (default: 5% of all)", None, at_least(0), "N", title=_TRAINING)
    )
    weight_decay: float = chosen(Option("decay of the optimizer", 0.0, _NOT_NEGATIVE, "W", title=_TRAINING))
    clip: float = chosen(Option("largest gradient norm of a step; 0 for no limit", 1.0, _NOT_NEGATIVE, "NORM", title=_TRAINING))
    seed: int = chosen(options.SEED)

    eval_data: Path | None = chosen(
        Option("held-out .txt or .jsonl, instead of a part of --data", parse=Path, metavar="FILE", title=_EVALUATION)
    )
    eval_fraction: float = chosen(Option("part of --data held out; 0 for none", 0.05, between(0, 1, included=True), "F", title=_EVALUATION))
    eval_sequences: int = chosen(Option("most sequences held out", 64, at_least(1), "N", title=_EVALUATION))
    eval_every: int = chosen(
        Option("score what is held out every N steps and after the last; 0: only before and after", 0, at_least(0), "N", title=_EVALUATION)
    )
    patience: int = chosen(
        Option("stop after N evaluations in a row that are no better than the best; 0: never", 0, at_least(0), "N", title=_EVALUATION)
    )
    keep_best: bool = chosen(
        Option("save the model of the best evaluation, not the last; it waits in OUT.checkpoints/best", False, title=_EVALUATION)
    )

    checkpoint_every: int = chosen(
        Option(
            "every N steps, write all that the run goes on from to the directory OUT.checkpoints; 0: only when it is interrupted",
            0,
            at_least(0),
            "N",
            title=_CHECKPOINTS,
        )
    )
    keep: int = chosen(Option("checkpoints that stay", 2, at_least(1), "N", title=_CHECKPOINTS))
    resume: bool = chosen(Option("go on from the latest checkpoint, with the same options", False, title=_CHECKPOINTS))

    json: bool = chosen(Option("progress on stdout, one JSON object a line; text for people stays on stderr", False, title=_REPORTS))
    tensorboard: Path | None = chosen(Option("write scalars for TensorBoard there", parse=Path, metavar="DIR", title=_REPORTS))
    record: Path | None = chosen(
        Option("write what each step really takes to this new file, for chunkft report --run", parse=Path, metavar="FILE", title=_REPORTS)
    )
    plan_json: Path | None = chosen(Option("write the plan to this file, for --schedule", parse=Path, metavar="FILE", title=_REPORTS))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs:g} and steps is {self.steps}: only one of them can be chosen")
        if self.eval_every and self.eval_data is None and self.eval_fraction == 0:
            raise ValueError(f"--eval-every {self.eval_every} needs something held out: pass --eval-data, or --eval-fraction above 0")
        for name, wanted in (("--patience", self.patience), ("--keep-best", self.keep_best)):
            if wanted and not self.eval_every:
                raise ValueError(f"{name} goes by evaluations during the training: pass --eval-every N")
