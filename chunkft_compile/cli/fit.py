"""`chunkft fit`: will it fit?"""

import argparse
from collections.abc import Callable
from typing import Any

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.offline import Question, add_shape, offline_budget, say_modelled
from chunkft_compile.cli.planned import say
from chunkft_compile.offline import OfflineModel, Shape, read_config, smallest_offline
from chunkft_compile.planner import smallest_budget

_EPILOG = """\
examples:
  chunkft fit llama-3-8b --device rtx4090 --seq 1024
  chunkft fit ./model/config.json --device rtx4060-laptop --budget 6GB --optimizer sgd-momentum

Prints the smallest budget, the largest batch at this length and the longest sequence at this batch. Exit code 0 if it fits, 2 if not.
Nothing is loaded or trained, and nothing has been measured on the device: figures are modelled."""

_MOST_BATCH = 4096
_MOST_SEQ = 2**20
_LINES = 8  # trials on a line before halving
_GRAIN = 128  # sequences are searched in steps of so many tokens where --seq is a multiple of it, else token by token


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "fit",
        help="tell whether a model can be trained on a device, and how far",
        description="Tell whether every parameter of a model can be trained on a device that need not be here, and how far.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape(parser)
    parser.add_argument("--budget", metavar="BYTES", help="memory to stay within (default: the device's, less its reserve)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; 0 for yes, 2 for no."""
    question = Question.of(args)
    budget = offline_budget(args.budget, question.device)
    shape = Shape(args.batch, args.seq)
    config = read_config(question.model)
    say(question.describe(shape))
    model = question.capture(shape)
    smallest, binding = smallest_offline(model, question.optimizer, question.choices, accumulating=question.accumulating)
    needed = _needed_nbytes(question, model, budget)
    fits = needed <= budget
    print(f"{'fits' if fits else 'does not fit'}: {question.describe(shape)}, in {format_nbytes(budget)}")
    print(f"smallest budget: {format_nbytes(smallest, up=True)} ({smallest} bytes), bound by {binding}")

    def need(batch: int, seq: int) -> int:
        if (batch, seq) == (args.batch, args.seq):
            return needed
        say(f"trying {batch} x {seq} tokens")
        return _needed_nbytes(question, question.capture(Shape(batch, seq)), budget)

    batch = largest(lambda n: need(n, args.seq), budget, start=args.batch, most=_MOST_BATCH)
    print(f"largest batch of {args.seq} tokens: {batch or 'none'}" + (" or more" if batch == _MOST_BATCH else ""))
    positions = int(getattr(config, "max_position_embeddings", _MOST_SEQ))
    grain = _GRAIN if args.seq % _GRAIN == 0 else 1
    seq = grain * largest(lambda n: need(args.batch, n * grain), budget, start=args.seq // grain, most=positions // grain)
    limit = " (all positions of the model)" if seq == positions else f" (in steps of {grain})" if grain > 1 else ""
    print(f"longest sequence in batches of {args.batch}: {seq or 'none'}{limit}")
    say_modelled(model, question.choices)
    return 0 if fits else 2


def _needed_nbytes(question: Question, model: OfflineModel, budget_nbytes: int) -> int:
    """The smallest budget for the chunks that `budget_nbytes` is cut into."""
    return smallest_budget(question.problem(model, budget_nbytes))[0]


def largest(need: Callable[[int], int], limit: int, *, start: int, most: int) -> int:
    """The largest number from 1 to `most` whose need is at most `limit`; 0 where there is none.

    Needs must not fall. They grow almost in a line with the batch, so each trial is where the line through the last two points meets the
    limit, kept between what is known to hold and what is known not to. A capture takes seconds, and few are needed this way.
    """
    holds, fails = 0, most + 1
    points: list[tuple[int, int]] = []
    trial = start
    while fails - holds > 1:
        points.append((trial, need(trial)))
        if points[-1][1] <= limit:
            holds = trial
        else:
            fails = trial
        trial = _meets(points[-2:], limit, 2 * trial if points[-1][1] <= limit else trial // 2)
        if len(points) > _LINES:  # the needs are no line: halve what is left
            trial = (holds + fails) // 2
        trial = min(max(trial, holds + 1), fails - 1)
    return holds


def _meets(points: list[tuple[int, int]], limit: int, otherwise: int) -> int:
    """Where the line through two points reaches the limit."""
    if len(points) < 2 or points[0][1] == points[1][1]:
        return otherwise
    (x0, y0), (x1, y1) = points
    return x1 + (limit - y1) * (x1 - x0) // (y1 - y0)
