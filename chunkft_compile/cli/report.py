"""`chunkft report`: a kept plan as a page, as text, or for the viewers of others."""

import argparse
import sys
from pathlib import Path
from typing import Any

from chunkft_compile.planner import Plan
from chunkft_compile.reports.comparison import comparison_sections
from chunkft_compile.reports.data import to_data
from chunkft_compile.reports.document import as_markdown, as_text
from chunkft_compile.reports.page import make_page, plotly_script
from chunkft_compile.reports.perfetto import to_perfetto
from chunkft_compile.reports.points import points_around
from chunkft_compile.reports.runs import Run, compare, read_run
from chunkft_compile.reports.snapshot import to_snapshot
from chunkft_compile.reports.summary import summary
from chunkft_compile.solving import read_plan
from chunkft_compile.writing import check_target, write_whole

_EPILOG = """\
examples:
  chunkft report plan.json
  chunkft report plan.json -o plan.html
  chunkft report plan.json --format markdown
  chunkft report plan.json --format perfetto -o trace.json
  chunkft report plan.json --run run.jsonl

formats:
  table       for a terminal (the default)
  markdown    for an issue
  html        one page with plots that needs no network (pip install 'chunkft_compile[report]')
  perfetto    the steps of a sweep in time, with memory: open it in https://ui.perfetto.dev or chrome://tracing
  memory-viz  every allocation of a sweep: python -m torch.cuda._memory_viz trace_plot FILE, or https://pytorch.org/memory_viz
  json        the data of the report, described in chunkft_compile/reports/data.py

PLAN is what chunkft plan --json or model.save_schedule wrote."""

_FORMATS = ("table", "markdown", "html", "perfetto", "memory-viz", "json")
_COMPARED = ("table", "markdown", "html")
_SUFFIXES = {".txt": "table", ".md": "markdown", ".html": "html", ".pickle": "memory-viz", ".json": "json"}


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "report",
        help="show a kept plan: table, Markdown, HTML, Perfetto, memory-viz, JSON",
        description="Show a plan that was kept: what is trained when, in which memory and time, and where things live.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a kept plan")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file (default: standard output)")
    parser.add_argument("--format", choices=_FORMATS, help=f"default: by the suffix of FILE ({', '.join(_SUFFIXES)}), or table")
    parser.add_argument("--run", type=Path, metavar="RUN", dest="recorded", help="compare with what a recorded run of the plan really took")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report. Cheap refusals come before the plan is read."""
    chosen = _format(args.format, args.output)
    if args.recorded is not None and chosen not in _COMPARED:
        raise ValueError(f"--run is for the formats {', '.join(_COMPARED)}: leave it out, or choose one of them")
    if args.output is not None:
        check_target(args.output, "-o")
    elif chosen in ("html", "memory-viz"):
        raise ValueError(f"{chosen} is for a file, not for standard output: name one with -o FILE")
    elif chosen in ("perfetto", "json") and sys.stdout.isatty():
        raise ValueError(f"{chosen} is for programs, not for a terminal: name a file with -o FILE, or pipe it into a program")
    planned = read_plan(args.plan)
    recorded = read_run(args.recorded) if args.recorded is not None else None
    content = _page(planned, args.plan.stem, recorded) if chosen == "html" else _render(chosen, planned, recorded)
    if args.output is not None:
        write_whole(args.output, content)
    else:
        assert isinstance(content, str), f"{chosen} needs a file"
        sys.stdout.write(content)
    return 0


def _format(given: str | None, output: Path | None) -> str:
    if given is not None or output is None:
        return given or "table"
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"-o {output} does not say its format: end it in {', '.join(_SUFFIXES)}, or pass --format")
    return _SUFFIXES[output.suffix.lower()]


def _render(chosen: str, planned: Plan, recorded: Run | None) -> str | bytes:
    match chosen:
        case "table" | "markdown":
            compared = comparison_sections(compare(planned, recorded), recorded) if recorded is not None else ()
            sections = (*summary(planned), *compared)
            return as_markdown(sections) if chosen == "markdown" else as_text(sections)
        case "perfetto":
            return to_perfetto(planned)
        case "memory-viz":
            return to_snapshot(planned)
        case "json":
            return to_data(planned)
        case _:
            raise AssertionError(f"unknown format {chosen}")


def _page(planned: Plan, name: str, recorded: Run | None) -> str:
    plotly_script()  # where there is none, refuse before the work
    return make_page(planned, name=name, run=recorded, points=points_around(planned))
