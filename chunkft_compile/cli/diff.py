"""`chunkft diff`: what one kept plan has other than another."""

import argparse
import sys
from pathlib import Path
from typing import Any

from chunkft_compile.reports.differences import differences
from chunkft_compile.reports.document import as_text
from chunkft_compile.solving import read_plan

_EPILOG = """\
examples:
  chunkft diff plan.json larger.json

Plans of different models are compared by their figures alone. A and B are what chunkft plan --json or model.save_schedule wrote."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "diff",
        help="compare two kept plans",
        description="Compare two kept plans: a verdict, what they were made for, figures, options of segments, and what is trained when.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", type=Path, help="a kept plan")
    parser.add_argument("second", metavar="B", type=Path, help="another one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the differences."""
    sys.stdout.write(as_text(differences(read_plan(args.first), read_plan(args.second))))
    return 0
