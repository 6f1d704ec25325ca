"""Predicted against measured peak memory: eight models, three budgets each.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --model gpt2 --fraction 0.5
    python -m benchmarks.prediction --update immediate

A budget is `smallest + fraction x (plain - smallest)`: between the smallest feasible one and what plain AdamW needs. The peak
of every step of the second sweep is measured as the exact number of live tensor bytes, each case alone in a process.
`options` counts what segments keep for their backward over all steps, `updates` when the steps apply their gradients.
Exits with 1 if a step needs more than predicted for it or more than the budget, if the prediction is more than 2 % above the
measured maximum, or if a budget is refused.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tabulate import tabulate
from torch.optim import AdamW

import chunkft_compile
from benchmarks.common import UPDATES, circumstances, compile_model, mb, run_alone, train_step
from benchmarks.models import HIDDEN, MODELS, ROWS, TOKENS, VOCABULARY, build
from chunkft_compile.runtime.allocators import install

SLACK = 1.02
DEFAULT = ("llama-tied", "llama", "gpt2", "bert-classifier", "qwen3", "gemma3", "t5", "convnet")


@dataclass(frozen=True)
class Case:
    """One model in one budget: predicted and measured peak of each step of a sweep, or the refusal; what the schedule chose."""

    model: str
    budget_nbytes: int
    predicted: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, or what is wrong."""
        if self.refusal:
            return self.refusal
        over = sum(measured > predicted for measured, predicted in zip(self.measured, self.predicted, strict=True))
        if over:
            return f"{over} steps over their prediction"
        if max(self.measured) > self.budget_nbytes:
            return "over budget"
        if max(self.predicted) > SLACK * max(self.measured):
            return "predicted too high"
        return "ok"


def budget_range(name: str, update: str) -> tuple[int, int]:
    """The smallest feasible budget and the peak of plain AdamW, in bytes."""
    module, batch = build(name)
    plain_nbytes = chunkft_compile.compile(module, budget="1TB").plain_peak_nbytes(**batch)
    module, batch = build(name)
    try:
        compile_model(module, "1MB", update).plan(**batch)
    except chunkft_compile.BudgetError as error:
        return error.smallest_nbytes, plain_nbytes
    raise AssertionError(f"{name} was planned in 1 MB, less than its weights")


def measure(name: str, budget_nbytes: int, update: str) -> Case:
    """Train two sweeps; the second is measured step by step."""
    hook = install()
    module, batch = build(name)
    try:
        model = compile_model(module, budget_nbytes, update)
        optimizer = AdamW(model.parameters(), lr=1e-5)
        train_step(model, optimizer, batch)
    except chunkft_compile.BudgetError as error:
        return Case(name, budget_nbytes, refusal=f"refused: {error}")
    steps = model.progress.steps
    for _ in range(steps - 1):
        train_step(model, optimizer, batch)
    predicted, measured = [], []
    for _ in range(steps):
        predicted.append(model.progress.predicted_nbytes)
        hook.reset()
        train_step(model, optimizer, batch)
        measured.append(hook.peak())
    schedule = model.schedule
    assert schedule is not None, "a trained model has a schedule"
    options = tuple(option for step in schedule.steps for option in step.options)
    return Case(name, budget_nbytes, tuple(predicted), tuple(measured), options, tuple(step.update for step in schedule.steps))


def _row(case: Case) -> tuple[object, ...]:
    if case.refusal:
        return case.model, mb(case.budget_nbytes), "", "", "", "", "", "", case.verdict
    predicted, measured = max(case.predicted), max(case.measured)
    figures = (len(case.measured), mb(predicted), mb(measured), f"{predicted / measured:.6f}")
    return case.model, mb(case.budget_nbytes), *figures, _counted(case.options), _counted(case.updates), case.verdict


def _counted(names: Iterable[str]) -> str:
    """`2 inputs, 4 save`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append", help=f"may be repeated (default: {', '.join(DEFAULT)})")
    parser.add_argument("--fraction", type=float, action="append", help="only this fraction; may be repeated (default: 0, 0.1, 0.5)")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")
    options = parser.parse_args()

    cases = []
    for name in options.model or DEFAULT:
        smallest, plain = run_alone(budget_range, name, options.update)
        budgets = [smallest + int(fraction * (plain - smallest)) for fraction in options.fraction or (0.0, 0.1, 0.5)]
        cases += [run_alone(measure, name, budget, options.update) for budget in budgets]
    headers = ("model", "budget MB", "T", "predicted MB", "measured MB", "predicted / measured", "options", "updates", "verdict")
    print(tabulate([_row(case) for case in cases], headers, disable_numparse=True, colalign=("left", *["right"] * 5, *["left"] * 3)))
    print(f"\nOver all schedules: {_counted(option for case in cases for option in case.options)}.")
    print(circumstances(f"fp32, hidden {HIDDEN}, vocabulary {VOCABULARY}, batch {ROWS} x {TOKENS} (see benchmarks/models.py), AdamW"))
    sys.exit(any(case.verdict != "ok" for case in cases))


if __name__ == "__main__":
    main()
