"""Solver against truth: does the plan that the solver prefers really take less time?

    python -m benchmarks.truth
    python -m benchmarks.truth --model gpt2 --fraction 0.05 --rounds 20

Each case is one model in one budget, `smallest + fraction x (plain - smallest)`. The same model is trained under the solver's schedule, the
greedy one, an equal-byte cut along the segments and groups of whole segments, each in the fewest steps that fit the budget, with the
fastest options and the optimizer state placed by the planner. All are in one process and take turns sweep by sweep, in another order
every round, after one sweep each that is not counted. `predicted` is the quotient of the predicted times of a sweep, `measured` that of the
medians of CPU seconds (`time.process_time`), both relative to the solver's schedule: above 1 the solver's is faster. The solver's schedule
runs a second time as a contestant of its own: its distance from 1 is the noise. Rows appear on stderr as they are measured.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from tabulate import tabulate
from torch.optim import AdamW

from benchmarks import schedules
from benchmarks.common import circumstances, compile_model, cpu_seconds, mb, run_alone, train_step
from benchmarks.models import HIDDEN, MODELS, ROWS, TOKENS, VOCABULARY, build
from benchmarks.prediction import budget_range
from chunkft_compile.planner import Problem, Schedule

DEFAULT, FRACTIONS, ROUNDS = ("llama", "gpt2", "vit"), (0.01, 0.04), 9
TIE = 0.03  # a difference that CPU seconds do not show
SOLVER, AGAIN = "solver", "solver, again"
FASTER, SLOWER, EQUAL = "solver faster", "solver slower", "no difference"
OTHERS: dict[str, Callable[[Problem], Schedule | None]] = {
    "greedy": schedules.greedy,
    "equal bytes": partial(schedules.by_method, name="equal-bytes"),
    "whole segments": partial(schedules.by_method, name="whole-segments"),
}


@dataclass
class Contestant:
    """A schedule, and the CPU seconds of its sweeps. `note` says why it was not run."""

    name: str
    schedule: Schedule | None
    note: str = ""
    sweeps_s: list[float] = field(default_factory=list)


class Sweeper:
    """The model under one schedule."""

    def __init__(self, name: str, budget_nbytes: int, schedule: Schedule) -> None:
        module, self._batch = build(name)
        self.model = compile_model(module, budget_nbytes)
        self._optimizer = AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.model.plan(**self._batch)
        self._steps = len(schedules.adopt(self.model, schedule).steps)

    def sweep(self) -> None:
        """Train every parameter once."""
        for _ in range(self._steps):
            train_step(self.model, self._optimizer, self._batch)


def propose(name: str, budget_nbytes: int) -> list[Contestant]:
    """The schedules, all for the costs measured once, with exact peaks and predicted times."""
    module, batch = build(name)
    model = compile_model(module, budget_nbytes)
    optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)
    chosen = model.plan(**batch)
    problem = model.problem
    assert problem is not None, "planned above"
    found = [Contestant(SOLVER, chosen), Contestant(AGAIN, chosen)]
    for other, make in OTHERS.items():
        schedule = make(problem)
        exact = schedules.adopt(model, schedule) if schedule else None
        note = "does not fit" if exact is None else "the same plan" if schedules.same(exact, chosen) else ""
        found.append(Contestant(other, exact, note))
    del optimizer  # the plan is for it, so it had to live until here
    return found


def run_case(name: str, budget_nbytes: int, rounds: int) -> list[Contestant]:
    """Time every schedule that differs, sweep by sweep in turns."""
    contestants = propose(name, budget_nbytes)
    running = [(c, Sweeper(name, budget_nbytes, c.schedule)) for c in contestants if c.schedule is not None and not c.note]
    for _, sweeper in running:
        sweeper.sweep()
    for number in range(rounds):
        first = number % len(running)
        for contestant, sweeper in running[first:] + running[:first]:
            contestant.sweeps_s.append(cpu_seconds(sweeper.sweep))
    return contestants


def compare(contestant: Contestant, solver: Contestant) -> tuple[float, float]:
    """Predicted and measured time of a sweep, relative to the solver's."""
    one, other = contestant.schedule, solver.schedule
    assert one is not None, f"{contestant.name} ran"
    assert other is not None, "the solver's ran"
    return one.sweep_us / other.sweep_us, median(contestant.sweeps_s) / median(solver.sweeps_s)


def _rows(name: str, budget_nbytes: int, contestants: list[Contestant]) -> list[tuple[str, ...]]:
    rows = []
    for contestant in contestants:
        start = (name, mb(budget_nbytes), contestant.name)
        if contestant.note or contestant.schedule is None:
            rows.append((*start, *[""] * 6, contestant.note))
            continue
        schedule = contestant.schedule
        predicted, measured = compare(contestant, contestants[0])
        figures = (
            str(len(schedule.steps)),
            mb(schedule.peak_nbytes),
            f"{schedule.sweep_us / 1e6:.3f}",
            f"{median(contestant.sweeps_s):.3f}",
        )
        rows.append((*start, *figures, f"{predicted:.2f}", f"{measured:.2f}", _verdict(contestant, predicted, measured)))
    return rows


def _verdict(contestant: Contestant, predicted: float, measured: float) -> str:
    if contestant.name in (SOLVER, AGAIN):
        return ""
    found, expected = _side(measured), _side(predicted)
    return found if found == expected else f"{found}, predicted: {expected}"


def _side(ratio: float) -> str:
    if abs(ratio - 1) <= TIE:
        return EQUAL
    return FASTER if ratio > 1 else SLOWER


def main() -> None:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append", help=f"may be repeated (default: {', '.join(DEFAULT)})")
    parser.add_argument("--fraction", type=float, action="append", help=f"may be repeated (default: {FRACTIONS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed sweeps of each schedule (default: %(default)s)")
    options = parser.parse_args()

    rows = []
    for name in options.model or DEFAULT:
        smallest, plain = run_alone(budget_range, name, "held")
        for fraction in options.fraction or FRACTIONS:
            budget_nbytes = smallest + int(fraction * (plain - smallest))
            found = _rows(name, budget_nbytes, run_alone(run_case, name, budget_nbytes, options.rounds))
            print(tabulate(found, tablefmt="plain", disable_numparse=True), file=sys.stderr, flush=True)
            rows += found
    headers = ("model", "budget MB", "schedule", "T", "peak MB", "predicted s", "CPU s", "predicted x", "measured x", "verdict")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "left", *["right"] * 6, "left")))
    beaten, lost, equal = (sum(row[-1].startswith(found) for row in rows) for found in (FASTER, SLOWER, EQUAL))
    print(f"\nAgainst plans other than its own, the solver's was faster in {beaten}, slower in {lost}, within {TIE:.0%} in {equal} cases.")
    print(circumstances(f"fp32, hidden {HIDDEN}, vocabulary {VOCABULARY}, batch {ROWS} x {TOKENS}, AdamW, fused"))


if __name__ == "__main__":
    main()
