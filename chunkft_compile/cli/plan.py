"""`chunkft plan`: what a budget buys for one model and batch shape."""

import argparse
from pathlib import Path
from typing import Any

from chunkft_compile.budget import format_nbytes, parse_budget
from chunkft_compile.cli.offline import Question, add_choices, is_offline, offline_budget, say_modelled
from chunkft_compile.cli.options import DTYPES, add_common, pick_device
from chunkft_compile.cli.planned import PlanConfig, planned_model, say
from chunkft_compile.offline import Shape, smallest_offline
from chunkft_compile.planner import BudgetError, Schedule, format_schedule, plan, to_json
from chunkft_compile.planner.devices import DEVICES
from chunkft_compile.pretrained import check_model

_EPILOG = """\
examples:
  chunkft plan ./SmolLM2-135M --budget 1.2GB --batch 1 --seq 256
  chunkft plan model.gguf --budget 13.5GiB --accumulate 8 --json plan.json
  chunkft plan llama-3-8b --device rtx4090 --batch 1 --seq 1024 --dtype bf16 --optimizer adamw

With a device that is not here (--device rtx4090, rtx3090, a100-80, h100, h800, rtx4060-laptop), MODEL may be a preset or a config.json:
weights are not read, --budget defaults to the device's memory less its reserve, and all figures are modelled, not measured.

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
    add_common(parser, budget_required=False)
    add_choices(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Cheap refusals come before the model is loaded."""
    if args.json is not None:
        _check_writable(args.json)
    return _run_offline(args) if is_offline(args.model, args.device) else _run_here(args)


def _run_here(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    if args.budget is None:
        raise ValueError(f'--budget is needed: memory on {device}, as "14GB"; only devices that are not here have a default')
    budget = parse_budget(args.budget, device)
    check_model(args.model)
    given = {"--update": args.update != "held", "--weights": args.weights != "device", "--host-memory": args.host_memory is not None}
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise ValueError(f"{wrong[0]} is for devices that are not here: name one with --device ({', '.join(DEVICES)})")
    shape = (args.batch, args.seq, args.accumulate)
    config = PlanConfig(args.model, budget, device, DTYPES[args.dtype], *shape, args.seconds, args.seed, args.optimizer)
    model, plain_nbytes = planned_model(config)
    print(format_schedule(model.problem, model.schedule))
    print(f"plain {args.optimizer or 'AdamW'} needs {format_nbytes(plain_nbytes)} (computed)")
    _write(args.json, model.schedule)
    return 0


def _run_offline(args: argparse.Namespace) -> int:
    question = Question.of(args)
    budget = offline_budget(args.budget, question.device)
    shape = Shape(args.batch, args.seq)
    say(question.describe(shape))
    model = question.capture(shape)
    problem = question.problem(model, budget)
    try:
        schedule = plan(problem, time_limit_s=args.seconds, seed=args.seed)
    except BudgetError as error:
        # larger budgets come with larger chunks: the advice is one that holds
        nbytes, binding = smallest_offline(model, question.optimizer, question.choices, accumulating=question.accumulating)
        raise BudgetError(str(error), smallest_nbytes=nbytes, binding=binding) from None
    print(format_schedule(problem, schedule))
    say_modelled(model)
    _write(args.json, schedule)
    return 0


def _write(path: Path | None, schedule: Schedule) -> None:
    if path is not None:
        path.write_text(to_json(schedule))
        say(f"wrote {path}")


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--json {path} cannot be written: {'it' if path.is_dir() else path.parent} is {'' if path.is_dir() else 'not '}a directory"
        )
