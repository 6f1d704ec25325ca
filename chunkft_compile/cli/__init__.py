"""The command `chunkft`: `plan` shows what a budget buys, `train` fine-tunes a model inside it; `fit` and `pareto` plan for a device that
need not be here, `report`, `explain` and `diff` show plans that were kept, `doctor` says what is here and whether a model can be cut into
chunks.

Exit codes: 0 done, 1 bad input or a failed run, 2 no plan fits the budget (or bad arguments), 130 interrupted, 141 nobody reads the output
any more, 143 terminated.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from chunkft_compile.cli import diff, doctor, explain, fit, pareto, plan, report, train
from chunkft_compile.cli.options import discard_stdout
from chunkft_compile.cli.stopping import Interrupted, Termination
from chunkft_compile.errors import BudgetError, CaptureError, MemoryPromiseError, TrainingError
from chunkft_compile.planner import StepsError

_EPILOG = """\
examples:
  chunkft plan ./SmolLM2-135M --budget 1.2GB --batch 1 --seq 256
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1.2GB --out ./tuned
  chunkft train model.gguf --data pairs.jsonl --budget 80% --out ./tuned --steps 200
  chunkft train model.gguf --data pairs.jsonl --schedule plan.json --out ./tuned
  chunkft train --config run.yaml
  chunkft fit llama-3-8b --device rtx4090 --seq 1024
  chunkft pareto llama-3-8b --device rtx4090 --seq 1024
  chunkft report plan.json -o plan.html
  chunkft explain plan.json
  chunkft diff plan.json other.json
  chunkft doctor ./SmolLM2-135M

`chunkft COMMAND --help` lists the options of each."""

_ERRORS = (
    BudgetError,
    CaptureError,
    TrainingError,
    MemoryPromiseError,
    ValueError,
    ArithmeticError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
)
_CPU_ALLOCATOR = "DefaultCPUAllocator"  # on a CPU, torch has no class for this error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    as_module = Path(sys.argv[0]).parts[-2:] == ("cli", "__main__.py")
    args.command_line = [
        *(("python", "-m", "chunkft_compile.cli") if as_module else ("chunkft",)),
        *(sys.argv[1:] if argv is None else argv),
    ]
    try:
        with Termination():
            code: int = args.run(args)
            sys.stdout.flush()  # here, where a reader that left is still an error that can be handled
    except KeyboardInterrupt as error:
        interrupted = Interrupted.of(error, "interrupted")
        print(f"\nchunkft: {interrupted}", file=sys.stderr)
        return interrupted.code
    except BrokenPipeError:  # `chunkft explain ... | head`: the reader has enough
        discard_stdout()
        return 141
    except _ERRORS as error:
        if args.debug:
            raise
        _print_error(error)
        return 2 if isinstance(error, BudgetError) else 1
    except RuntimeError as error:
        if args.debug or _CPU_ALLOCATOR not in str(error):
            raise
        _print_error(error, "this machine has too little memory left: ")
        return 1
    return code


def _print_error(error: BaseException, title: str = "") -> None:
    """One line, after those that others added: how to go on."""
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    print(f"chunkft: error: {title}{_one_line(error)}", file=sys.stderr)


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
