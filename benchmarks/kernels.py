"""What the kernels of a step do: its CPU time by kind of operator, as multiples of the FLOP bound.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --dtype bf16 --budget 480MB
    python -m benchmarks.kernels --dtype bf16 --budget 480MB --backend inductor
    python -m benchmarks.kernels --streamed     # weights may leave the device

Plain AdamW and ours with resident weights, each in a process of its own. The bound is the time that the step's own matrix products would
take at the rate of one product of the MLP, measured between the steps, so products that run at that rate are 1.00. Operators are those of
torch's profiler over one sweep; the step's own CPU time is that of a sweep without it. "Everything else" is what no operator took: Python,
autograd, the dispatch of operators, and copies on other threads. `compiled` are Inductor's fused loops; its products are called like any
other.
"""

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from tabulate import tabulate
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import circumstances, cpu_seconds, run_alone
from benchmarks.contestants import PLAIN
from benchmarks.llama import DTYPES, add_options, build_batch, describe
from benchmarks.trials import Entry, Product, count_flops
from chunkft_compile.budget import parse_budget

KINDS = {
    "products": r"^(aten::(mm|addmm|bmm|baddbmm|linear|matmul)|mkldnn::.*)$",
    "attention": r"^aten::.*(scaled_dot_product|attention)",
    "optimizer": r"^aten::_(fused|foreach)",
    "softmax and loss": r"^aten::.*(softmax|nll_loss|cross_entropy|logsumexp)",
    "casts and copies": r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_|zero_|zeros.*|full.*|empty.*|resize_)$",
    "embedding": r"^aten::(embedding.*|index.*|_index.*|gather|scatter.*)$",
    "norms, products of elements": r"^aten::",
    "compiled": r"(cpp_fused|^kernel|^graph_)",
}
"""The first pattern that an operator's name matches says its kind."""

REST = "everything else"


@dataclass(frozen=True)
class Spent:
    """CPU seconds of one step by kind, and what its products take at the rate of one."""

    seconds: dict[str, float]
    bound_s: float


def spend(entry: Entry) -> Spent:
    """One sweep beside products, and one under the profiler, after one to warm up. Must have its process for itself."""
    if entry.backend == "inductor":
        torch._inductor.config.cpp.enable_kernel_profile = True  # or the profiler does not see its loops
    trainer, batch, product = entry.build(), build_batch(), Product(DTYPES[entry.dtype])
    trainer.step(batch)
    steps = trainer.steps
    for _ in range(steps - 1):
        trainer.step(batch)
    total = 0.0
    for _ in range(steps):
        total += cpu_seconds(lambda: trainer.step(batch))
        product.run()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(steps):
            trainer.step(batch)
    seconds = {kind: spent / steps for kind, spent in by_kind(watched.key_averages()).items()}
    flops = count_flops(trainer, batch, steps)
    return Spent(seconds | {REST: total / steps - sum(seconds.values())}, flops / steps / product.flops_per_s)


def by_kind(events: EventList) -> dict[str, float]:
    """Seconds that operators took themselves, without those they call."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), None)
        if kind is not None:
            found[kind] += event.self_cpu_time_total / 1e6
    return dict(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager", help="what runs our codes (default: %(default)s)")
    parser.add_argument("--streamed", action="store_true", help="weights may leave the device where the plan is faster for it")
    options = parser.parse_args()
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    plain = Entry(PLAIN, options.layers, dtype=options.dtype)
    ours = Entry("ours", options.layers, budget_nbytes, options.update, resident=not options.streamed)
    ours = replace(ours, dtype=options.dtype, backend=options.backend)
    found = [run_alone(spend, entry) for entry in (plain, ours)]
    rows = []
    for kind in [*KINDS, REST]:
        spent = [one.seconds.get(kind, 0.0) for one in found]
        if any(spent):
            rows.append([kind, *(cell for one, s in zip(found, spent, strict=True) for cell in (f"{s:.3f}", f"{s / one.bound_s:.2f}"))])
    sums = [sum(one.seconds.values()) for one in found]
    rows.append(["a step", *(cell for one, s in zip(found, sums, strict=True) for cell in (f"{s:.3f}", f"{s / one.bound_s:.2f}"))])
    headers = ["", f"{PLAIN}, CPU s", "x bound", f"{options.budget}, {options.backend}, CPU s", "x bound"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4)))
    print(circumstances(describe(options.layers, options.dtype)))


if __name__ == "__main__":
    main()
