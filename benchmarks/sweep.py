"""Seconds until every parameter was trained once, under equal bytes: rotation, checkpointing, in-backward updates, and ours.

    python -m benchmarks.sweep                                        # 12-layer Llama of 134M parameters; about an hour
    python -m benchmarks.sweep --layers 2 --budgets 600MB 500MB --updates held
    python -m benchmarks.sweep --json > sweep.json

Ours gets the bytes that each other method needs (those within 1 % of each other share a row, at the smaller), and the budgets given,
which should lie between and below. Peaks are exact live tensor bytes over a whole sweep after a first one, each contestant alone in its
process. Times are of whole sweeps after a first one, with one step of plain AdamW after each step of the contestant in the same
process, so that both see the same machine; the row of plain AdamW is a second plain model, and its distance from 1.00 is the noise. CPU
seconds are `time.process_time`: all threads, and the system's copies to and from the file. What a background thread still does when the
plain step starts is booked on the plain step. Rows appear on stderr as they are measured.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from tabulate import tabulate

from benchmarks.common import UPDATES, circumstances, mb, run_alone
from benchmarks.contestants import BADAM, HIFT, RIVALS
from benchmarks.llama import describe
from benchmarks.trials import Entry, Peak, Refusal, Times, measure_peak, measure_times
from chunkft_compile.budget import parse_budget

LAYERS = 12  # of the model that the aims are about
BUDGETS = ("1000MB", "880MB", "755MB")
SAME = 1.01  # budgets closer than this share a row
AIM_NBYTES, AIM_TIME, AIM_SHARE = 760_000_000, 1.3, 1 / 3
HEADERS = (
    "method",
    "budget MB",
    "peak MB",
    "predicted MB",
    "T",
    "CPU s/step",
    "x time/step",
    "CPU s/sweep",
    "x time/sweep",
    "wall s/sweep",
)


@dataclass(frozen=True)
class Row:
    """One contestant: what was measured, or why it was not."""

    entry: Entry
    peak: Peak | Refusal
    times: Times | None

    @property
    def steps(self) -> int:
        """Steps of a sweep; 0 for a refusal."""
        return self.peak.steps if isinstance(self.peak, Peak) else 0

    @property
    def nbytes(self) -> int:
        """Measured peak."""
        assert isinstance(self.peak, Peak), f"{self.entry.name}: {self.peak}"
        return self.peak.nbytes

    @property
    def sweep_ratio(self) -> float:
        """CPU time of a sweep, in plain steps."""
        assert self.times is not None, f"{self.entry.name}: {self.peak}"
        return self.times.ratio * self.steps


@dataclass(frozen=True)
class Aim:
    """A target, what came out, and whether that is enough."""

    text: str
    found: str
    met: bool


def measure_rows(entries: Iterable[Entry], least_steps: int) -> Iterator[Row]:
    """Measure one after the other, each peak and each time in a process of its own."""
    for entry in entries:
        peak = run_alone(measure_peak, entry)
        row = Row(entry, peak, run_alone(measure_times, entry, least_steps) if isinstance(peak, Peak) else None)
        print("  ".join(map(str, _cells(row))), file=sys.stderr, flush=True)
        yield row


def our_entries(layers: int, budgets: Sequence[int], updates: Sequence[str]) -> list[Entry]:
    """Ours at each budget, the largest first; of budgets within 1 % of each other only the smallest."""
    kept: list[int] = []
    for budget in sorted(budgets):
        if not kept or budget > SAME * kept[-1]:
            kept.append(budget)
    return [Entry(f"ours, {update.upper()}", layers, budget, update) for budget in reversed(kept) for update in updates]


def unable(rivals: Sequence[Row], budget: int) -> str:
    """The methods that need more than a budget, with what they need."""
    found = [f"{row.entry.name} ({mb(row.nbytes)})" for row in rivals if row.nbytes > budget]
    return "; ".join(found) or "none"


def judge(rivals: Sequence[Row], ours: Sequence[Row]) -> list[Aim]:
    """The aims, from the rows."""
    measured = [row for row in ours if row.times is not None]
    layerwise = {"HiFT m = 1": HIFT, "BAdam": BADAM}
    aims = []
    for variants in layerwise.values():
        for rival in (row for row in rivals if row.entry.name in variants):
            aims += [_share(rival, update, measured) for update in dict.fromkeys(row.entry.update for row in ours)]
    for name, variants in layerwise.items():
        need = min((row.nbytes for row in rivals if row.entry.name in variants), default=0)
        least = min((row.nbytes for row in measured), default=0)
        if need:
            aims.append(Aim(f"a budget that {name} cannot meet", f"{mb(least)} MB, {name} needs {mb(need)}", 0 < least < need))
    return [*aims, _every_step(measured)]


def _share(rival: Row, update: str, measured: Sequence[Row]) -> Aim:
    """Our sweep against a rival's in at most its bytes."""
    text = f"{update.upper()} sweep at most {AIM_SHARE:.2f} of {rival.entry.name}, within its {mb(rival.nbytes)} MB"
    fitting = [row.sweep_ratio for row in measured if row.entry.update == update and row.nbytes <= rival.nbytes]
    if not fitting:
        return Aim(text, "no plan in these bytes was measured", False)
    share = min(fitting) / rival.sweep_ratio
    return Aim(text, f"{share:.2f}", share <= AIM_SHARE)


def _every_step(measured: Sequence[Row]) -> Aim:
    """Every parameter at every step in few bytes and little time."""
    text = f"AdamW for every parameter at every step in {mb(AIM_NBYTES)} MB and {AIM_TIME} x CPU time of plain ({LAYERS} layers)"
    single = [row for row in measured if row.steps == 1 and row.nbytes <= AIM_NBYTES]
    if not single:
        least = min((row.nbytes for row in measured if row.steps == 1), default=0)
        return Aim(text, f"the smallest peak with T = 1 is {mb(least)} MB" if least else "no row with T = 1", False)
    best = min(single, key=lambda row: row.sweep_ratio)
    met = best.sweep_ratio <= AIM_TIME and best.entry.layers == LAYERS
    return Aim(text, f"{best.entry.name}: {mb(best.nbytes)} MB, {best.sweep_ratio:.2f} x, {best.entry.layers} layers", met)


def _cells(row: Row) -> tuple[str, ...]:
    entry, budget = row.entry, mb(row.entry.budget_nbytes) if row.entry.budget_nbytes else ""
    if isinstance(row.peak, Refusal) or row.times is None:
        return (f"{entry.name}, {row.peak}", budget, *[""] * (len(HEADERS) - 2))
    peak, times, own_s = row.peak, row.times, fmean(row.times.own_s)
    predicted = mb(peak.predicted_nbytes) if peak.predicted_nbytes is not None else ""
    wall_s = times.wall_s / len(times.own_s) * peak.steps
    step = (f"{own_s:.2f}", f"{times.ratio:.2f}")
    sweep = (f"{own_s * peak.steps:.1f}", f"{row.sweep_ratio:.2f}", f"{wall_s:.1f}")
    return (entry.name, budget, mb(peak.nbytes), predicted, str(peak.steps), *step, *sweep)


def _print_report(rivals: Sequence[Row], ours: Sequence[Row], budgets: Sequence[int], where: str) -> None:
    lines = [_cells(row) for row in [*rivals, *ours]]
    lines += [(f"cannot: {unable(rivals, budget)}", mb(budget), *[""] * (len(HEADERS) - 2)) for budget in budgets]
    widths = [60, *[None] * (len(HEADERS) - 1)]
    align = ("left", *["right"] * (len(HEADERS) - 1))
    print(tabulate(lines, HEADERS, disable_numparse=True, colalign=align, maxcolwidths=widths))
    aims = [(aim.text, aim.found, "met" if aim.met else "missed") for aim in judge(rivals, ours)]
    print("\n" + tabulate(aims, ("aim", "found", ""), disable_numparse=True))
    print(f"\n{where}; AdamW(fused=True)")


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--budgets", nargs="*", default=BUDGETS, help=f"further budgets of ours (default: {' '.join(BUDGETS)})")
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=["held", "immediate"], help="rows of ours at each budget")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS), help="only these other methods")
    parser.add_argument("--steps", type=int, default=5, help="least number of steps that are timed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args()
    budgets = [parse_budget(budget, torch.device("cpu")) for budget in options.budgets]

    rivals = list(measure_rows([Entry(name, options.layers) for name in options.rivals], options.steps))
    entries = our_entries(options.layers, [*budgets, *(row.nbytes for row in rivals)], options.updates)
    ours = list(measure_rows(entries, options.steps))
    where = circumstances(describe(options.layers))
    if options.json:
        rows, aims = [asdict(row) for row in [*rivals, *ours]], [asdict(aim) for aim in judge(rivals, ours)]
        print(json.dumps({"rows": rows, "aims": aims, "where": where}))
        return
    _print_report(rivals, ours, budgets, where)


if __name__ == "__main__":
    main()
