"""Memory and CPU time of a training step in a byte budget, against plain AdamW.

    python -m benchmarks.step                       # 12-layer Llama of 134M parameters, 880 MB
    python -m benchmarks.step --layers 2 --budget 600MB
    python -m benchmarks.step --fused --json

The peak is the exact number of live tensor bytes, each contestant alone in a process. CPU seconds (`time.process_time`) are
averaged over one whole sweep, because the steps of a sweep differ, with one plain step after each of ours, so that both see
the same machine. A first sweep, which also makes the optimizer state, is not measured. What a background thread of ours is still doing when
the plain step starts is booked on the plain step.
"""

import argparse
import json
from dataclasses import asdict
from statistics import fmean

import torch
from tabulate import tabulate

from benchmarks.common import UPDATES, circumstances, mb, run_alone
from benchmarks.contestants import PLAIN
from benchmarks.llama import describe
from benchmarks.trials import Entry, Peak, Refusal, Times, measure_peak, measure_times
from chunkft_compile.budget import parse_budget


def _table(entry: Entry, plain: Peak, ours: Peak, times: Times) -> str:
    ours_s, plain_s = fmean(times.own_s), fmean(times.plain_s)
    predicted, plain_predicted = ours.predicted_nbytes, ours.plain_predicted_nbytes
    assert predicted is not None, "ours predicts its peak"
    assert plain_predicted is not None, "and that of plain training"
    rows = [
        ("plain AdamW(fused=True)", mb(plain.nbytes), "1.000", f"{plain_s:.2f}", "1.00", 1, mb(plain_predicted)),
        (
            f"{entry.name}{', fused' if entry.fused else ''}",
            mb(ours.nbytes),
            f"{ours.nbytes / plain.nbytes:.3f}",
            f"{ours_s:.2f}",
            f"{times.ratio:.2f}",
            ours.steps,
            mb(predicted),
        ),
    ]
    headers = ("method", "peak MB", "x bytes", "CPU s/step", "x time", "T", "predicted MB")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="880MB", help="budget of the compiled model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) for the compiled model too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    name = f"chunkft_compile, {options.budget}{'' if options.update == 'held' else f', {options.update}'}"
    entry = Entry(name, options.layers, budget_nbytes, options.update, options.fused)

    plain, ours = run_alone(measure_peak, Entry(PLAIN, options.layers)), run_alone(measure_peak, entry)
    if isinstance(ours, Refusal):
        parser.exit(2, f"{name}: {ours}\n")
    assert isinstance(plain, Peak), "plain training has no budget"
    times, where = run_alone(measure_times, entry, 1), circumstances(describe(options.layers))
    if options.json:
        print(json.dumps({"entry": asdict(entry), "plain": asdict(plain), "ours": asdict(ours), "times": asdict(times), "where": where}))
        return
    print(_table(entry, plain, ours, times))
    sweep_s, plain_s = sum(times.own_s), fmean(times.plain_s)
    print(f"\nEvery parameter trained once: {sweep_s:.1f} CPU s ({ours.steps} steps), plain AdamW {plain_s:.1f} s (1 step).")
    print(f"Peak before the measured sweep, planning included: {mb(ours.start_nbytes)} MB.")
    print(where)


if __name__ == "__main__":
    main()
