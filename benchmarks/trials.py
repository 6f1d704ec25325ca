"""One contestant measured: its peak alone in a process, its time beside plain AdamW in the same process."""

import time
from dataclasses import dataclass
from math import ceil
from statistics import fmean

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import chunkft_compile
from benchmarks.common import Batch, cpu_seconds, mb
from benchmarks.contestants import COMPILED, PLAIN, RIVALS, Ours, Trainer
from benchmarks.llama import DTYPES, HIDDEN, ROWS, TOKENS, WIDE, build_batch
from chunkft_compile.assembly import Assembled
from chunkft_compile.planner.program import Op
from chunkft_compile.runtime.allocators import install


@dataclass(frozen=True)
class Entry:
    """A contestant on a model of `layers` blocks: one of `RIVALS`, or with a budget, ours."""

    name: str
    layers: int
    budget_nbytes: int = 0
    update: str = "held"
    fused: bool = True
    dtype: str = "fp32"
    backend: str = "eager"
    resident: bool = False

    @property
    def hides_operators(self) -> bool:
        """Whether compiled code runs instead of operators that can be counted."""
        return self.name == COMPILED or self.backend != "eager"

    def build(self) -> Trainer:
        """Its model, optimizers and loop."""
        if not self.budget_nbytes:
            return RIVALS[self.name](self.layers, self.dtype)
        return Ours(
            self.layers,
            self.budget_nbytes,
            self.update,
            fused=self.fused,
            dtype=self.dtype,
            backend=self.backend,
            resident=self.resident,
        )


@dataclass(frozen=True)
class Peak:
    """Bytes live at the worst moment of a sweep of `steps`; `start_nbytes` is the same for all that came before it, planning included.

    For ours: what was predicted for it, and for plain training with the same optimizer.
    """

    nbytes: int
    start_nbytes: int
    steps: int
    predicted_nbytes: int | None = None
    plain_predicted_nbytes: int | None = None


@dataclass(frozen=True)
class Times:
    """CPU seconds of each step of whole sweeps, those of the plain step after each, and the wall time of the former together.

    `first_s` is the wall time of the first step, with everything that is compiled, measured and planned in it. `flops` are the
    floating-point operations of all matrix products of one sweep (0 where compiled code hides its operators); `flops_per_s` is the rate
    of a product of the shape that the model has most of, measured between the steps.
    """

    own_s: list[float]
    plain_s: list[float]
    wall_s: float
    first_s: float = 0.0
    flops: int = 0
    flops_per_s: float = 0.0

    @property
    def ratio(self) -> float:
        """CPU time of a step, in plain steps."""
        return fmean(self.own_s) / fmean(self.plain_s)


@dataclass(frozen=True)
class Refusal:
    """No plan fits the budget."""

    smallest_nbytes: int

    def __str__(self) -> str:
        return f"refused: the smallest budget is {mb(self.smallest_nbytes)} MB"


def measure_peak(entry: Entry) -> Peak | Refusal:
    """One sweep to make all optimizer state, and one that is measured. Must have its process for itself."""
    hook = install()
    trainer, batch = entry.build(), build_batch()
    try:
        trainer.step(batch)
    except chunkft_compile.BudgetError as error:
        return Refusal(error.smallest_nbytes)
    steps = trainer.steps
    for _ in range(steps - 1):
        trainer.step(batch)
    start_nbytes = hook.peak()
    hook.reset()
    for _ in range(steps):
        trainer.step(batch)
    nbytes = hook.peak()
    if not isinstance(trainer, Ours):
        return Peak(nbytes, start_nbytes, steps)
    return Peak(nbytes, start_nbytes, steps, trainer.model.plan(**batch).peak_nbytes, trainer.model.plain_peak_nbytes(**batch))


def measure_times(entry: Entry, least_steps: int) -> Times:
    """Whole sweeps of at least `least_steps` steps after a first sweep, each step followed by a plain one."""
    trainer, plain, batch = entry.build(), RIVALS[PLAIN](entry.layers, entry.dtype), build_batch()
    plain.step(batch)
    start = time.perf_counter()
    trainer.step(batch)
    first_s = time.perf_counter() - start
    steps = trainer.steps
    for _ in range(steps - 1):
        trainer.step(batch)
    own_s, plain_s, wall_s = [], [], 0.0
    product = Product(DTYPES[entry.dtype])
    for _ in range(steps * ceil(least_steps / steps)):
        start = time.perf_counter()
        own_s.append(cpu_seconds(lambda: trainer.step(batch)))
        wall_s += time.perf_counter() - start
        plain_s.append(cpu_seconds(lambda: plain.step(batch)))
        product.run()
    flops = 0 if entry.hides_operators else count_flops(trainer, batch, steps)
    return Times(own_s, plain_s, wall_s, first_s, flops, product.flops_per_s)


class Product:
    """The product of a batch with a matrix of the MLP, timed again and again."""

    _CALLS = 8

    def __init__(self, dtype: torch.dtype) -> None:
        self._a = torch.randn(ROWS * TOKENS, HIDDEN).to(dtype)
        self._b = torch.randn(HIDDEN, WIDE).to(dtype)
        self._flops, self._seconds = 0, 0.0

    def run(self) -> None:
        """Some calls, timed together."""
        torch.mm(self._a, self._b)
        self._seconds += cpu_seconds(self._calls)
        self._flops += self._CALLS * 2 * ROWS * TOKENS * HIDDEN * WIDE

    def _calls(self) -> None:
        for _ in range(self._CALLS):
            torch.mm(self._a, self._b)

    @property
    def flops_per_s(self) -> float:
        """The rate over all calls."""
        return self._flops / self._seconds


def count_flops(trainer: Trainer, batch: Batch, steps: int) -> int:
    """Operations of the matrix products of one sweep, attention included."""
    if isinstance(trainer, Ours):
        return sum(_program_flops(program) for program in trainer.programs())
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(steps):
            trainer.step(batch)
    return int(counter.get_total_flops())


def _program_flops(assembled: Assembled) -> int:
    """Of the calls of its codes. A mode that counts them as they run would keep tensors that the program frees."""
    calls = [assembled.codes[i.code].graph for i in assembled.program.instructions if i.op in (Op.FORWARD, Op.BACKWARD)]
    return sum(_node_flops(node) for graph in calls for node in graph.nodes)


def _node_flops(node: fx.Node) -> int:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if node.op != "call_function" or count is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"]))
