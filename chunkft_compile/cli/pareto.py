"""`chunkft pareto`: what more memory buys, from the smallest budget to the one where nothing is left to gain."""

import argparse
from typing import Any

from tabulate import tabulate

from chunkft_compile.budget import budgets_between, format_nbytes
from chunkft_compile.cli.offline import Question, add_shape, say_modelled
from chunkft_compile.cli.options import at_least, between
from chunkft_compile.cli.planned import say
from chunkft_compile.offline import OfflineModel, Shape, smallest_offline
from chunkft_compile.planner import BudgetError, Placement, Schedule, plan

_EPILOG = """\
examples:
  chunkft pareto llama-3-8b --device rtx4090 --seq 1024
  chunkft pareto gpt2-xl --device rtx3090 --points 12 --update auto --weights host

The last row has room for everything: all parameters at every step, all optimizer state and weights on the device. Rows over the device's
own memory are marked. Figures are modelled: nothing has been measured on the device."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "pareto",
        help="print a table of budgets and the sweeps they buy",
        description="Print budget, seconds per sweep and steps per sweep, from the smallest budget to the one with room for everything.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape(parser)
    parser.add_argument("--points", type=at_least(2), default=8, metavar="N", help="budgets in the table (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=between(0, float("inf")), default=5.0, metavar="S", help="time for the solver, for each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the solver (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan at every budget and print the table."""
    question = Question.of(args)
    shape = Shape(args.batch, args.seq)
    say(question.describe(shape))
    model = question.capture(shape)

    def schedule(budget_nbytes: int) -> Schedule:
        return plan(question.problem(model, budget_nbytes), time_limit_s=args.seconds, seed=args.seed)

    smallest, binding = smallest_offline(model, question.optimizer, question.choices, accumulating=question.accumulating)
    rows = []
    for budget in budgets_between(smallest, _room_for_everything(question, model, smallest), args.points):
        say(f"planning for {format_nbytes(budget)}")
        try:
            rows.append(_row(model, budget, schedule(budget)))
        except BudgetError as error:  # larger chunks than those of the smallest budget: no hole in the table, but said
            rows.append([format_nbytes(budget), "-", "-", "-", f"no: its chunks need {format_nbytes(error.smallest_nbytes, up=True)}", ""])
    print(tabulate(rows, headers=["budget", "T", "s per sweep", "peak", "status", ""], disable_numparse=True))
    print(f"{question.describe(shape)}; the smallest budget is bound by {binding}")
    say_modelled(model, question.choices)
    return 0


def _room_for_everything(question: Question, model: OfflineModel, smallest: int) -> int:
    """The smallest budget, to two per cent, with one step per sweep and all weights and optimizer state on the device."""

    def has_room(budget_nbytes: int) -> bool:
        try:
            schedule = plan(question.problem(model, budget_nbytes), time_limit_s=1.0)
        except BudgetError:  # its larger chunks do not fit
            return False
        places = {*schedule.places.state, *schedule.places.weights}
        return len(schedule.steps) == 1 and places == {Placement.DEVICE}

    low, high = smallest, 2 * smallest
    while not has_room(high):
        low, high = high, 2 * high
    while high - low > high // 50:
        middle = (low + high) // 2
        low, high = (low, middle) if has_room(middle) else (middle, high)
    return high


def _row(model: OfflineModel, budget: int, schedule: Schedule) -> list[str]:
    status = schedule.status if schedule.status == "OPTIMAL" else f"{schedule.status}, gap {100 * schedule.gap:.1f}%"
    note = f"more than {model.device.name} has" if budget > model.device.budget_nbytes else ""
    return [
        format_nbytes(budget, up=True),
        str(len(schedule.steps)),
        f"{schedule.sweep_us / 1e6:.3f}",
        format_nbytes(schedule.peak_nbytes),
        status,
        note,
    ]
