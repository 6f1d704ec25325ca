"""`chunkft train`: the options of a fine-tuning run. What a run does is in `fine_tune`."""

import argparse
import math
from pathlib import Path
from typing import Any

from chunkft_compile.cli.choices import add_precision, add_search, add_update
from chunkft_compile.cli.fine_tune import TrainConfig, fine_tune
from chunkft_compile.cli.options import DTYPES, add_common, at_least, between

_EPILOG = """\
data:
  .txt    plain text; documents may be separated by the model's end-of-text token, written out.
          It is cut into sequences of --seq tokens.
  .jsonl  one JSON object a line: {"text": ...}, {"prompt": ..., "completion": ...} or {"question": ..., "answer": ...}.
          Prompts and questions are read, not learned. Each line is padded to --seq tokens.

examples:
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1.2GB --out ./tuned --seq 256
  chunkft train model.gguf --data pairs.jsonl --budget 80% --out ./tuned --steps 200 --accumulate 8
  chunkft train ./SmolLM2-135M --data notes.txt --schedule plan.json --out ./tuned --seq 256
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1GB --update auto --clip 0 --out ./tuned
  chunkft train ./model --data notes.txt --budget 1GB --out ./tuned --checkpoint-every 100   (stopped? again with --resume)
  chunkft train ./model --data notes.txt --budget 6GB --dtype bf16 --precision master --out ./tuned
  chunkft train ./model --data train.txt --eval-data heldout.txt --budget 13.5GiB --out ./tuned --epochs 2

With --update immediate or auto, gradients are applied inside backward: there is no clipping (--clip 0) and no accumulation.
The result loads with AutoModelForCausalLM.from_pretrained("./tuned"). Ctrl-C saves no model;
checkpoints that were written before stay."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "train",
        help="fine-tune all of a model inside a budget",
        description="Fine-tune every parameter of a causal language model with AdamW inside a budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, budget_required=False)
    parser.add_argument(
        "--schedule", type=Path, metavar="FILE", help="run this plan, which chunkft plan --json wrote, under its own budget"
    )
    add_precision(parser)
    add_update(parser)
    add_search(parser)
    _add_files(parser)
    _add_training(parser)
    parser.set_defaults(run=run)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".txt or .jsonl to train on")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out .txt or .jsonl, instead of a part of --data")
    parser.add_argument(
        "--eval-fraction",
        type=between(0, 1, included=True),
        default=TrainConfig.eval_fraction,
        metavar="F",
        help=f"part of --data held out, at most {TrainConfig.eval_sequences} sequences; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the fine-tuned model")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    parser.add_argument(
        "--checkpoint-every",
        type=at_least(1),
        default=TrainConfig.checkpoint_every,
        metavar="N",
        help="every N steps, write all that the run goes on from to the directory OUT.checkpoints; the last two stay",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest of them, with the same options")


def _add_training(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=between(0, math.inf), default=TrainConfig.epochs, metavar="E", help="passes over the data (default: 1)"
    )
    length.add_argument("--steps", type=at_least(1), metavar="N", help="optimizer steps, instead of --epochs")
    parser.add_argument("--lr", type=between(0, math.inf), default=TrainConfig.lr, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--warmup", type=at_least(0), metavar="N", help="steps until it is reached (default: 5%% of all); cosine after")
    parser.add_argument(
        "--weight-decay",
        type=between(0, math.inf, included=True),
        default=TrainConfig.weight_decay,
        metavar="W",
        help="decay of AdamW (default: %(default)s)",
    )
    parser.add_argument(
        "--clip",
        type=between(0, math.inf, included=True),
        default=TrainConfig.clip,
        metavar="NORM",
        help="largest gradient norm of a step; 0 for no limit (default: %(default)s)",
    )
    parser.add_argument("--measure", action="store_true", help="on a CPU, measure the peak of two sweeps with torch's profiler (slower)")


def run(args: argparse.Namespace) -> int:
    """Train, save, report."""
    fine_tune(
        TrainConfig(
            model=args.model,
            data=args.data,
            budget=args.budget,
            out=args.out,
            eval_data=args.eval_data,
            eval_fraction=args.eval_fraction,
            overwrite=args.overwrite,
            epochs=args.epochs,
            steps=args.steps,
            batch=args.batch,
            seq=args.seq,
            accumulate=args.accumulate,
            lr=args.lr,
            warmup=args.warmup,
            weight_decay=args.weight_decay,
            clip=args.clip,
            dtype=DTYPES[args.dtype],
            device=args.device,
            seed=args.seed,
            solve_seconds=args.seconds,
            measure=args.measure,
            schedule=args.schedule,
            update=args.update,
            prefer=args.prefer,
            max_steps=args.max_steps,
            checkpoint_every=args.checkpoint_every,
            resume=args.resume,
            precision=args.precision,
        )
    )
    return 0
