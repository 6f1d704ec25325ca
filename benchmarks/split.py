"""Where the CPU time of a step goes: forward and backward codes, the optimizer's kernels, copies on worker threads, and all the rest.

    python -m benchmarks.split
    python -m benchmarks.split --dtype bf16 --budget 480MB
    python -m benchmarks.split --layers 2 --budget 600MB --limit 0.1

The rest is Python: the engine's own work for each instruction, autograd's, the loop's and the optimizer's bookkeeping. It is what is left
of the CPU time of the thread that trains (`time.thread_time`), over one whole sweep after two that are not measured. Copies are the CPU
time of all other threads. Exits with 1 if the rest is more than `--limit` of a step.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch.optim import adam as functional

from benchmarks.common import circumstances, run_alone
from benchmarks.contestants import Ours
from benchmarks.llama import add_options, build_batch, describe
from chunkft_compile.budget import parse_budget
from chunkft_compile.planner.program import Op
from chunkft_compile.runtime.engine import Run

FORWARD, BACKWARD, OPTIMIZER = "forward codes", "backward codes", "optimizer kernels"
COPIES, REST = "copies (other threads)", "engine, loop"


class Clock:
    """CPU seconds of this thread by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time is booked on `what`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[what] += time.thread_time() - start

        return run


@contextmanager
def watching(clock: Clock) -> Iterator[None]:
    """Book what the engine calls, and what the optimizer does with tensors."""
    make, update = Run.__init__, functional.adam

    def timed_run(self: Run, program: Any, calls: Any, *args: Any, **kwargs: Any) -> None:
        names = {i.code: FORWARD if i.op is Op.FORWARD else BACKWARD for i in program.instructions if i.op in (Op.FORWARD, Op.BACKWARD)}
        make(self, program, [clock.timed(names[number], call) for number, call in enumerate(calls)], *args, **kwargs)

    setattr(Run, "__init__", timed_run)  # noqa: B010 (mypy takes the plain assignment for a mistake)
    functional.adam = clock.timed(OPTIMIZER, update)
    try:
        yield
    finally:
        setattr(Run, "__init__", make)  # noqa: B010
        functional.adam = update


def split(layers: int, dtype: str, budget_nbytes: int, update: str, backend: str) -> tuple[dict[str, float], int]:
    """CPU seconds of one sweep by what they went to, and its steps. Must have its process for itself."""
    trainer, batch, clock = Ours(layers, budget_nbytes, update, fused=True, dtype=dtype, backend=backend), build_batch(), Clock()
    trainer.step(batch)
    steps = trainer.steps
    for _ in range(2 * steps - 1):
        trainer.step(batch)
    everywhere, here = time.process_time(), time.thread_time()
    with watching(clock):
        for _ in range(steps):
            trainer.step(batch)
    here = time.thread_time() - here
    everywhere = time.process_time() - everywhere
    found = {what: clock.seconds[what] for what in (FORWARD, BACKWARD, OPTIMIZER)}
    return found | {COPIES: everywhere - here, REST: here - sum(found.values())}, steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager", help="what runs the codes (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.03, help="the largest share that the rest may have (default: %(default)s)")
    options = parser.parse_args()
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    seconds, steps = run_alone(split, options.layers, options.dtype, budget_nbytes, options.update, options.backend)
    total = sum(seconds.values())
    rows = [(what, f"{spent / steps:.3f}", f"{100 * spent / total:.1f}") for what, spent in seconds.items()]
    rows.append(("a step", f"{total / steps:.3f}", "100.0"))
    print(tabulate(rows, ("", "CPU s/step", "%"), disable_numparse=True, colalign=("left", "right", "right")))
    print(f"{options.budget}, {options.update}, {options.backend}: {steps} steps to a sweep")
    print(circumstances(describe(options.layers, options.dtype)))
    sys.exit(seconds[REST] > options.limit * total)


if __name__ == "__main__":
    main()
