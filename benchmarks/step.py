"""A training step in a byte budget beside the same step of other methods: memory, CPU time, and how far from the rate of matrix products.

    python -m benchmarks.step                       # 12-layer Llama of 134M parameters, 880 MB, fp32
    python -m benchmarks.step --dtype bf16 --budget 480MB
    python -m benchmarks.step --layers 2 --budget 600MB --methods "plain AdamW" ours
    python -m benchmarks.step --json

The peak is the exact number of live tensor bytes, each contestant alone in a process. CPU seconds (`time.process_time`) are averaged over
whole sweeps, because the steps of a sweep differ, with one plain step after each of the contestant's, so that both see the same machine;
`x time` is their ratio. A first sweep, which also makes the optimizer state, is not measured. What a background thread of ours is still
doing when the plain step starts is booked on the plain step.

`x FLOP bound` is the CPU time over the time that the step's own matrix products would take at the rate of one product of the MLP, measured
between the steps. What threads of ours copy is CPU time, too; wall seconds are of use where nothing else runs. `first step` is the wall
time of the first step beyond the time of another: capture, measuring, planning, compiling.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import torch
from tabulate import tabulate

from benchmarks.common import circumstances, mb, run_alone
from benchmarks.contestants import CHECKPOINTING, COMPILED, HIFT, LORA, PLAIN
from benchmarks.llama import ROWS, TOKENS, add_options, describe
from benchmarks.trials import Entry, Peak, Refusal, Times, measure_peak, measure_times
from chunkft_compile.budget import parse_budget

_RESIDENT = Entry("ours, resident weights", 0, resident=True)
OURS = {
    entry.name: entry
    for entry in (Entry("ours", 0), _RESIDENT, replace(_RESIDENT, name="ours, resident weights, Inductor", backend="inductor"))
}
METHODS = (PLAIN, COMPILED, CHECKPOINTING, *HIFT, LORA, *OURS)
HEADERS = (
    "method",
    "peak MB",
    "x bytes",
    "CPU s/step",
    "wall s/step",
    "x time",
    "tokens/CPU s",
    "x FLOP bound",
    "T",
    "first step s",
    "predicted MB",
)


@dataclass(frozen=True)
class Row:
    """One method; `flops` of a sweep of the same program, where its own code hides its operators."""

    entry: Entry
    peak: Peak
    times: Times
    flops: int

    @property
    def seconds(self) -> float:
        """CPU seconds of a step."""
        return fmean(self.times.own_s)

    @property
    def bound_s(self) -> float:
        """Seconds of the matrix products of a step at the measured rate."""
        return self.flops / self.peak.steps / self.times.flops_per_s

    def cells(self, plain: Peak) -> tuple[str, ...]:
        """Its line of the table."""
        compile_s = max(0.0, self.times.first_s - self.times.wall_s / len(self.times.own_s))
        predicted = self.peak.predicted_nbytes
        return (
            self.entry.name,
            mb(self.peak.nbytes),
            f"{self.peak.nbytes / plain.nbytes:.3f}",
            f"{self.seconds:.2f}",
            f"{self.times.wall_s / len(self.times.own_s):.2f}",
            f"{self.times.ratio:.2f}",
            f"{ROWS * TOKENS / self.seconds:.0f}",
            f"{self.seconds / self.bound_s:.2f}" if self.flops else "",
            str(self.peak.steps),
            f"{compile_s:.1f}",
            mb(predicted) if predicted is not None else "",
        )


def entries(options: argparse.Namespace) -> list[Entry]:
    """The contestants that were asked for."""
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    found = []
    for name in options.methods:
        entry = replace(OURS.get(name, Entry(name, 0)), layers=options.layers, dtype=options.dtype)
        if name in OURS:
            title = f"{name}, {options.budget}{'' if options.update == 'held' else f', {options.update}'}"
            entry = replace(entry, name=title, budget_nbytes=budget_nbytes, update=options.update)
        found.append(entry)
    return found


def measure(entry: Entry, least_steps: int) -> Row | Refusal:
    """Peak and time of one method, each in a process of its own."""
    peak = run_alone(measure_peak, entry)
    if isinstance(peak, Refusal):
        return peak
    times = run_alone(measure_times, entry, least_steps)
    return Row(entry, peak, times, times.flops)


def _same_work(entry: Entry) -> object:
    """Equal for methods whose programs do the same, whatever runs them."""
    return entry.budget_nbytes > 0, entry.resident


def with_flops(rows: list[Row]) -> list[Row]:
    """Compiled code hides its operators from the counter: it does the work of the same program uncompiled."""
    known = {_same_work(row.entry): row.flops for row in rows if row.entry.name == PLAIN or (row.entry.budget_nbytes and row.flops)}
    return [replace(row, flops=known.get(_same_work(row.entry), 0)) if row.entry.hides_operators else row for row in rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="some of: " + "; ".join(METHODS))
    parser.add_argument("--steps", type=int, default=3, help="least number of steps that are timed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    rows: list[Row] = []
    for entry in entries(options):
        found = measure(entry, options.steps)
        if isinstance(found, Refusal):
            parser.exit(2, f"{entry.name}: {found}\n")
        rows.append(found)
        print(f"{entry.name}: {found.seconds:.2f} s, {mb(found.peak.nbytes)} MB", file=sys.stderr, flush=True)
    rows, where = with_flops(rows), circumstances(describe(options.layers, options.dtype))
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "where": where}))
        return
    plain = next((row.peak for row in rows if row.entry.name == PLAIN), rows[0].peak)
    print(tabulate([row.cells(plain) for row in rows], HEADERS, disable_numparse=True, colalign=("left", *["right"] * 10)))
    rate = fmean(row.times.flops_per_s for row in rows)
    print(f"\nA product of the MLP runs at {rate / 1e9:.1f} GFLOP/s (mean over the processes).")
    print(where)


if __name__ == "__main__":
    main()
