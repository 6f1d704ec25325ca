"""`chunkft explain`: why a kept plan has its peak, its T and its time, and what would change them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from chunkft_compile.cli.options import at_least
from chunkft_compile.reports.document import as_text
from chunkft_compile.reports.reasons import reasons, reasons_at
from chunkft_compile.solving import read_plan

_EPILOG = """\
examples:
  chunkft explain plan.json
  chunkft explain plan.json --step 2
  chunkft explain plan.json --step 2 --at "backward block 3"
  chunkft explain plan.json --at 17

Without --step and --at, other sweeps are looked for, which takes seconds. PLAN is what chunkft plan --json or model.save_schedule wrote."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="say why a kept plan has its peak, T and time",
        description="Say what fills the peak of a kept plan, what would lower it, what holds T, and where its time goes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a kept plan")
    parser.add_argument("--step", type=at_least(1), metavar="N", help="only this step, from 1 on (with --at alone: the fullest)")
    parser.add_argument("--at", metavar="INSTANT", help="only this instruction, by number from 1 on or by name (default: the peak)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the reasons."""
    planned = read_plan(args.plan)
    sections = reasons(planned) if args.step is None and args.at is None else reasons_at(planned, args.step, args.at)
    sys.stdout.write(as_text(sections))
    return 0
