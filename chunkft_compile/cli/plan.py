"""`chunkft plan`: what a budget buys for one model and batch shape."""

import argparse
from pathlib import Path
from typing import Any

from chunkft_compile.budget import format_nbytes, parse_budget
from chunkft_compile.cli.options import DTYPES, add_common, pick_device
from chunkft_compile.cli.planned import PlanConfig, planned_model, say
from chunkft_compile.planner import format_schedule, to_json
from chunkft_compile.pretrained import check_model

_EPILOG = """\
examples:
  chunkft plan ./SmolLM2-135M --budget 1.2GB --batch 1 --seq 256
  chunkft plan model.gguf --budget 13.5GiB --accumulate 8 --json plan.json

Nothing is trained and the model is not changed. Exit code 2 if no plan fits; the error names the smallest budget that does."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="print the schedule for a model under a budget",
        description="Plan the fine-tuning of a causal language model under a budget, print the schedule and write it as JSON.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Cheap refusals come before the model is loaded."""
    device = pick_device(args.device)
    budget = parse_budget(args.budget, device)
    check_model(args.model)
    if args.json is not None:
        _check_writable(args.json)
    shape = (args.batch, args.seq, args.accumulate)
    model, plain_nbytes = planned_model(PlanConfig(args.model, budget, device, DTYPES[args.dtype], *shape, args.seconds, args.seed))
    print(format_schedule(model.problem, model.schedule))
    print(f"plain AdamW needs {format_nbytes(plain_nbytes)} (computed)")
    if args.json is not None:
        args.json.write_text(to_json(model.schedule))
        say(f"wrote {args.json}")
    return 0


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--json {path} cannot be written: {'it' if path.is_dir() else path.parent} is {'' if path.is_dir() else 'not '}a directory"
        )
