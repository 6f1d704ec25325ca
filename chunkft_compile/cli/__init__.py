"""The command `chunkft`: `plan` shows what a budget buys, `train` fine-tunes a model inside it; `fit` and `pareto` plan for a device that
need not be here, `report`, `explain` and `diff` show plans that were kept, `doctor` says what is here and whether a model can be cut into
chunks.

Exit codes: 0 done, 1 bad input or a failed run, 2 no plan fits the budget (or bad arguments), 130 interrupted, 141 nobody reads the output
any more.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from chunkft_compile.cli import diff, doctor, explain, fit, pareto, plan, report, train
from chunkft_compile.errors import BudgetError, CaptureError, TrainingError
from chunkft_compile.planner import StepsError

_EPILOG = """\
examples:
  chunkft plan ./SmolLM2-135M --budget 1.2GB --batch 1 --seq 256
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1.2GB --out ./tuned
  chunkft train model.gguf --data pairs.jsonl --budget 80% --out ./tuned --steps 200
  chunkft train model.gguf --data pairs.jsonl --schedule plan.json --out ./tuned
  chunkft fit llama-3-8b --device rtx4090 --seq 1024
  chunkft pareto llama-3-8b --device rtx4090 --seq 1024
  chunkft report plan.json -o plan.html
  chunkft explain plan.json
  chunkft diff plan.json other.json
  chunkft doctor ./SmolLM2-135M

`chunkft COMMAND --help` lists the options of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # here, where a reader that left is still an error that can be handled
    except KeyboardInterrupt:
        print("\nchunkft: interrupted; no model was saved", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `chunkft explain ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again on its way out, and complains
        return 141
    except (BudgetError, CaptureError, TrainingError, ValueError, ArithmeticError, OSError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        print(f"chunkft: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, BudgetError) else 1
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, BudgetError) and not isinstance(error, StepsError):  # that one says its way out
        # in bytes: a rounded figure handed back as a budget could be too small again
        way_out = f"bound by {error.binding}; the smallest that does: --budget {error.smallest_nbytes}B"
        return f"{str(error).splitlines()[0]} ({way_out})"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chunkft",
        description="Full-parameter fine-tuning inside a byte budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"chunkft {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (plan, train, fit, pareto, report, explain, diff, doctor):
        module.add_parser(commands)
    return parser


def _version() -> str:
    try:
        return version("chunkft_compile")
    except PackageNotFoundError:
        return "(not installed)"
