"""What the planner does on well-known models, without their weights and without the device: modelled, not measured.

    python -m benchmarks.planner                        # every preset, and the cases below
    python -m benchmarks.planner --model llama-3-8b --seconds 30
    python -m benchmarks.planner --json

Part one, a row per model: seconds to capture and tabulate, seconds to solve, gap, T, predicted peak and sweep, and the sweep of the same
bytes by rivals that choose by rule: greedy, HiFT's one segment per step, groups of m neighbouring segments with the best m, pieces of
equal bytes. Rivals get the planner's options and state that stays wherever they leave room; only who is trained when is theirs.
The budget is all of the device less its reserve. Weights that take more than 80 % of it may live on the host; rivals then stream
every segment, as they must.

Part two: the ChunkFT paper's case (Llama-2-7B, 1 x 1024 tokens, bf16, AdamW): the smallest feasible budgets with resident and with
streamed weights, and the sweeps there and at a few larger ones.

Seconds are wall seconds of this machine, memory is the resident set of the process.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from tabulate import tabulate

from benchmarks.common import circumstances, run_alone
from chunkft_compile.offline import Choices, OfflineModel, Shape, read_config, smallest_offline
from chunkft_compile.planner import BudgetError, Placement, Problem, Update, plan
from chunkft_compile.planner.bundling import bundle
from chunkft_compile.planner.devices import find_device
from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.greedy import greedy_steps, steps_of
from chunkft_compile.planner.grounds import Ground, leanest
from chunkft_compile.planner.methods import METHODS, method_steps
from chunkft_compile.planner.problem import Step

SHAPE = Shape(1, 1024)
RESIDENT = (14_500_000_000,)
STREAMED = (2_000_000_000, 6_000_000_000)
RIVALS = {"greedy": "greedy", "hift": "one segment", "whole-segments": "best m", "equal-bytes": "equal bytes"}
CASES = (
    ("gpt2-medium", "rtx4060-laptop"),
    ("qwen3-0.6b", "rtx4060-laptop"),
    ("gemma-3-1b", "rtx4060-laptop"),
    ("llama-2-7b", "rtx4090"),
    ("mistral-7b", "rtx4090"),
    ("qwen3-8b", "rtx4090"),
    ("llama-3-8b", "rtx4090"),
    ("llama-3-70b", "h100"),
)


@dataclass(frozen=True)
class Row:
    """One model under one budget. Rivals map a name to microseconds of a sweep, None where they do not fit."""

    model: str
    device: str
    update: str
    budget_nbytes: int
    capture_s: float
    solve_s: float
    status: str
    gap: float
    steps: int
    peak_nbytes: int
    sweep_us: int
    rivals: dict[str, int | None]
    rss_nbytes: int


def planned(name: str, device: str, seconds: float) -> list[Row]:
    """HELD, and HELD or IMMEDIATE as the solver likes."""
    start = time.perf_counter()
    model = OfflineModel(read_config(name), SHAPE, torch.bfloat16, find_device(device))
    budget = model.device.budget_nbytes
    resident = model.weights_nbytes <= 0.8 * budget
    weights = (Placement.DEVICE,) if resident else (Placement.DEVICE, Placement.HOST)
    model.problem(budget, "adamw", Choices())
    capture_s = time.perf_counter() - start
    rows = []
    for update, updates in (("held", (Update.HELD,)), ("auto", tuple(Update))):
        problem = model.problem(budget, "adamw", Choices(updates, weights=weights))
        start = time.perf_counter()
        schedule = plan(problem, time_limit_s=seconds)
        solve_s = time.perf_counter() - start
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            Row(
                name,
                device,
                update,
                budget,
                capture_s,
                solve_s,
                schedule.status,
                schedule.gap,
                len(schedule.steps),
                schedule.peak_nbytes,
                schedule.sweep_us,
                {rival: rival_us(problem, rival) for rival in RIVALS} if update == "held" else {},
                rss,
            )
        )
    return rows


def rival_us(problem: Problem, rival: str) -> int | None:
    """Microseconds of a sweep of this rival, with all options of the planner and as much state on the device as it leaves room for."""
    bundled = bundle(problem)
    ground = leanest(bundled.problem)
    found = [greedy_steps(ground)] if rival == "greedy" else _sweeps(rival, ground)
    times = [sum(step.us for step in finish(problem, Draft(steps, ground.places.weights), bundled)[0]) for steps in found if steps]
    return min(times, default=None)


def _sweeps(rival: str, ground: Ground) -> Iterator[tuple[Step, ...] | None]:
    """Every cut of a rival that fits: for groups of segments all m, for the others the first."""
    if rival != "whole-segments":
        yield method_steps(ground, rival)
        return
    for bins in METHODS[rival].cut(ground.problem):
        yield steps_of(ground, bins, ground.problem.budget_nbytes)


@dataclass(frozen=True)
class Point:
    """The paper's case under one budget. `binding` is what needs the smallest one, with weights where they may be."""

    allowed: str
    smallest_nbytes: int
    binding: str
    update: str
    overlap: bool
    budget_nbytes: int
    weights: str
    status: str
    steps: int
    sweep_us: int


def paper_case(name: str, device: str, seconds: float) -> list[Point]:
    """The smallest budgets, with the weights on the device and with weights on the host, and budgets that are easier to live with."""
    model = OfflineModel(read_config(name), SHAPE, torch.bfloat16, find_device(device))
    rows = []
    for places, more in (((Placement.DEVICE,), RESIDENT), ((Placement.DEVICE, Placement.HOST), STREAMED)):
        for update, updates in (("held", (Update.HELD,)), ("auto", tuple(Update))):
            for overlap in (False, True) if len(places) > 1 else (False,):
                choices = Choices(updates, weights=places, overlap=overlap)
                smallest, binding = smallest_offline(model, "adamw", choices)
                where = "streamed" if len(places) > 1 else "resident"
                for budget in more:
                    schedule = plan(model.problem(budget, "adamw", choices), time_limit_s=seconds)
                    place = "streamed" if Placement.HOST in schedule.places.weights else "resident"
                    fewest = (where, smallest, binding)
                    rows.append(Point(*fewest, update, overlap, budget, place, schedule.status, len(schedule.steps), schedule.sweep_us))
    return rows


def _line(row: Row) -> tuple[str, ...]:
    rivals = [row.rivals.get(name, 0) for name in RIVALS]
    return (
        row.model,
        row.device,
        row.update,
        f"{row.budget_nbytes / 1e9:.1f}",
        f"{row.capture_s:.1f}",
        f"{row.solve_s:.1f}",
        f"{row.gap:.2%}",
        str(row.steps),
        f"{row.peak_nbytes / 1e9:.2f}",
        f"{row.sweep_us / 1e6:.2f}",
        *("" if us == 0 else "does not fit" if us is None else f"{us / 1e6:.2f}" for us in rivals),
        f"{row.rss_nbytes / 1e9:.1f}",
    )


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name, _ in CASES], action="append", help="only this model; may be repeated")
    parser.add_argument("--seconds", type=float, default=12.0, help="work of the solver, in its seconds (default: %(default)s)")
    parser.add_argument("--no-paper-case", action="store_true", help="leave part two out")
    parser.add_argument("--only-paper-case", action="store_true", help="leave part one out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()

    cases = [] if options.only_paper_case else [case for case in CASES if not options.model or case[0] in options.model]
    rows = []
    for name, device in cases:
        try:
            rows += run_alone(planned, name, device, options.seconds)
        except BudgetError as error:
            raise SystemExit(f"{name} on {device}: {error}") from error
    points = [] if options.no_paper_case else run_alone(paper_case, "llama-2-7b", "rtx4090", options.seconds)
    if options.json:
        print(json.dumps({"models": [asdict(row) for row in rows], "paper": [asdict(point) for point in points]}))
        return
    rivals = [f"{text} s" for text in RIVALS.values()]
    headers = ("model", "device", "update", "budget GB", "capture s", "solve s", "gap", "T", "peak GB", "sweep s", *rivals, "RSS GB")
    print(tabulate([_line(row) for row in rows], headers, disable_numparse=True, colalign=("left", "left", "left", *["right"] * 12)))
    if points:
        print("\nLlama-2-7B, 1 x 1024 tokens, bf16, AdamW, on an RTX 4090 (the ChunkFT paper needs 13.72 GB)")
        columns = (
            "weights may be",
            "smallest GB",
            "bound by",
            "update",
            "copies overlap",
            "budget GB",
            "weights are",
            "status",
            "T",
            "sweep s",
        )
        lines = []
        for p in points:
            allowed = (p.allowed, f"{p.smallest_nbytes / 1e9:.3f}", p.binding, p.update, "yes" if p.overlap else "no")
            lines.append((*allowed, f"{p.budget_nbytes / 1e9:.1f}", p.weights, p.status, str(p.steps), f"{p.sweep_us / 1e6:.2f}"))
        print(tabulate(lines, columns, disable_numparse=True))
    print(f"\n{circumstances(f'{SHAPE.batch} x {SHAPE.seq} tokens, bf16, AdamW; devices modelled, not measured')}")


if __name__ == "__main__":
    main()
