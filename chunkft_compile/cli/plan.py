"""`chunkft plan`: what a budget buys for one model and batch shape."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from chunkft_compile.budget import format_nbytes, parse_budget
from chunkft_compile.cli.choices import add_ingredients, add_method, add_optimizer, add_places, add_precision, add_search, add_update
from chunkft_compile.cli.offline import Question, is_offline, offline_budget, say_modelled
from chunkft_compile.cli.options import DTYPES, add_common, pick_device
from chunkft_compile.cli.planned import PlanConfig, planned_model, say
from chunkft_compile.offline import OfflineModel, Shape, smallest_offline
from chunkft_compile.planner import BudgetError, Schedule, StepsError, Update, format_schedule, plan, plan_method
from chunkft_compile.planner.devices import DEVICES
from chunkft_compile.pretrained import check_model
from chunkft_compile.solving import write_plan
from chunkft_compile.writing import check_target

_EPILOG = """\
examples:
  chunkft plan ./SmolLM2-135M --budget 1.2GB --batch 1 --seq 256
  chunkft plan model.gguf --budget 13.5GiB --accumulate 8 --json plan.json
  chunkft plan llama-3-8b --device rtx4090 --batch 1 --seq 1024 --dtype bf16 --optimizer adamw
  chunkft plan llama-3-8b --device rtx4090 --seq 1024 --dtype bf16 --options inputs,tiled --state host
  chunkft plan llama-3-8b --device rtx4090 --seq 1024 --dtype bf16 --precision master --update auto
  chunkft plan llama-3-8b --device rtx4090 --seq 1024 --dtype bf16 --method hift

--json FILE keeps the plan; chunkft train --schedule FILE runs it, on the device and for the model, batch and optimizer it was made for.

With a device that is not here (--device rtx4090, rtx3090, a100-80, h100, h800, rtx4060-laptop), MODEL may be a preset or a config.json:
weights are not read, --budget defaults to the device's memory less its reserve, and all figures are modelled, not measured.

Nothing is trained and the model is not changed. Exit code 2 if no plan fits; the error names the smallest budget that does."""

_TOLERANCE = 100  # the smallest budget of a method is found to one part in so many


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
    for add in (add_optimizer, add_precision, add_update, add_search, add_ingredients, add_method, add_places):
        add(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to this file, for chunkft train --schedule")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Cheap refusals come before the model is loaded."""
    if args.json is not None:
        check_target(args.json, "--json")
    return _run_offline(args) if is_offline(args.model, args.device) else _run_here(args)


def _run_here(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    if args.budget is None:
        raise ValueError(f'--budget is needed: memory on {device}, as "14GB"; only devices that are not here have a default')
    budget = parse_budget(args.budget, device)
    check_model(args.model)
    _refuse_offline_choices(args)
    shape = (args.batch, args.seq, args.accumulate)
    config = PlanConfig(
        args.model,
        budget,
        device,
        DTYPES[args.dtype],
        *shape,
        args.seconds,
        args.seed,
        args.optimizer,
        args.update or "held",
        args.prefer or "time",
        args.max_steps,
        args.options,
        args.state,
        precision=args.precision,
    )
    model, plain_nbytes = planned_model(config)
    print(format_schedule(model.problem, model.schedule))
    print(f"plain {args.optimizer or 'AdamW'} needs {format_nbytes(plain_nbytes)} (computed)")
    if args.json is not None:
        model.save_schedule(args.json)
        say(f"wrote {args.json}")
    return 0


def _refuse_offline_choices(args: argparse.Namespace) -> None:
    """What only a device that is not here can be planned with, and why."""
    for option, given, reason in [
        ("--weights", args.weights != "device", "here the planner decides which weights leave the device"),
        ("--host-memory", args.host_memory is not None, "here optimizer state has one place, which has no limit"),
        ("--overlap", args.overlap, "here copies run beside compute, at the speed that is measured"),
        ("--method", args.method is not None, "methods are planned to compare with, not to run"),
    ]:
        if given:
            raise ValueError(f"{option} is for devices that are not here: {reason}; leave it out, or name one of {', '.join(DEVICES)}")


def _run_offline(args: argparse.Namespace) -> int:
    question = Question.of(args)
    if args.method is not None:
        question = _for_method(question, args)
    budget = offline_budget(args.budget, question.device)
    shape = Shape(args.batch, args.seq)
    say(question.describe(shape))
    model = question.capture(shape)
    problem = question.problem(model, budget)
    schedule = _planned(args, question, model, budget) if args.method is None else _method(args.method, question, model, budget)
    if args.method is not None:
        print(f"the method {args.method}; its gap is that to the fastest sweep there may be")
    print(format_schedule(problem, schedule))
    say_modelled(model, question.choices)
    if args.json is not None:
        write_plan(model.kept(problem, schedule, question.optimizer), args.json)
        say(f"wrote {args.json}")
    return 0


def _planned(args: argparse.Namespace, question: Question, model: OfflineModel, budget: int) -> Schedule:
    problem = question.problem(model, budget)
    try:
        return plan(problem, prefer=args.prefer or "time", max_steps=args.max_steps, time_limit_s=args.seconds, seed=args.seed)
    except StepsError:
        raise  # there are schedules, none with so few steps
    except BudgetError as error:
        # larger budgets come with larger chunks: the advice is one that holds
        nbytes, binding = smallest_offline(model, question.optimizer, question.choices, accumulating=question.accumulating)
        raise BudgetError(str(error), smallest_nbytes=nbytes, binding=binding) from None


def _for_method(question: Question, args: argparse.Namespace) -> Question:
    """With the updates that a method may need, where none were chosen. Raises `ValueError` for what a method fixes itself."""
    given = {"--options": args.options, "--prefer": args.prefer, "--max-steps": args.max_steps}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise ValueError(
            f"--method {args.method} and {wrong[0]} contradict each other: a method has its own steps and options; leave one out"
        )
    if args.update is not None or question.accumulating:
        return question
    return replace(question, choices=replace(question.choices, updates=tuple(Update)))


def _method(name: str, question: Question, model: OfflineModel, budget: int) -> Schedule:
    schedule = plan_method(question.problem(model, budget), name)
    if schedule is None:
        nbytes = _smallest_for(name, question, model, budget)
        raise BudgetError(
            f"the method {name} does not fit {format_nbytes(budget)} ({budget} bytes)",
            smallest_nbytes=nbytes,
            binding=f"the steps of {name}",
        )
    return schedule


def _smallest_for(name: str, question: Question, model: OfflineModel, too_small: int) -> int:
    """A budget in which a method fits, at most one per cent above one in which it does not."""

    def fits(nbytes: int) -> bool:
        return plan_method(question.problem(model, nbytes), name) is not None

    enough = 2 * too_small
    while not fits(enough):
        too_small, enough = enough, 2 * enough
    while enough - too_small > enough // _TOLERANCE:
        middle = (too_small + enough) // 2
        too_small, enough = (too_small, middle) if fits(middle) else (middle, enough)
    return enough
