"""What compiling costs by depth: CPU seconds of `compile` and `model.plan`, and of their parts.

    python -m benchmarks.depth                          # Llamas of 4, 12 and 32 layers
    python -m benchmarks.depth --backend inductor       # and what Inductor takes for the codes of a sweep
    python -m benchmarks.depth --layers 12 48 --repeats 1
    python -m benchmarks.depth --full                   # every layer is traced, as where layers are not equal

Every figure is that of a process of its own which has compiled a small model of another width before, so that imports and what torch makes
once do not count; of several repeats it is the one with the least total. "copied" are the layers that were not traced. Operators are
measured anew, and Inductor's caches are empty; what it takes is that of one sweep, with the C++ compiler, which it starts in one process
after the other.
"""

import argparse
import importlib
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args
from unittest import mock

import torch
from tabulate import tabulate
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Batch, circumstances, run_alone, train_step
from chunkft_compile import compile
from chunkft_compile.module import ChunkedModule
from chunkft_compile.runtime.chunks import storage_nbytes

Backend = Literal["eager", "inductor"]
TOKENS, HIDDEN, VOCABULARY = 64, 256, 4000
OTHER_HIDDEN = 192  # of the model that is compiled before: no shape and no code of it comes again
PARTS = {
    "capture": "making.capture_shallow",
    "- proof that layers are equal": "shallow.blocks_to_trace",
    "- tracing": "shallow.capture",
    "- copying": "shallow.repeat",
    "cut": "compiled.cut",
    "probe": "compiled.probe",
    "planner": "solving.plans",
    "- CP-SAT": "planner.planning.solve",
    "exact programs": "compiled.Compiled.exact",
    "Inductor": "inductor.Inductor.calls",
}
"""Where the function of each part is looked up; those with a dash are part of the one above."""


def build_model(layers: int, hidden: int = HIDDEN) -> nn.Module:
    """A Llama with random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY * hidden // HIDDEN,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).train()
    return model


def compile_and_plan(plain: nn.Module, backend: Backend, share: float) -> tuple[ChunkedModule, Optimizer]:
    """What is measured: plans without a search."""
    budget_nbytes = int(share * storage_nbytes(list(plain.parameters())))
    model = compile(plain, budget_nbytes, backend=backend, solve_seconds=0.2)
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)  # the plan looks for it
    model.plan(**_batch())
    return model, optimizer


def measure(layers: int, *, full: bool, backend: Backend, share: float) -> dict[str, float]:
    """CPU seconds of every part, and how many layers were copied."""
    with TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        return _measure(layers, full=full, backend=backend, share=share)


def _measure(layers: int, *, full: bool, backend: Backend, share: float) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    train_step(*compile_and_plan(build_model(2, OTHER_HIDDEN), backend, share), _batch())
    plain = build_model(layers)
    with ExitStack() as patches:
        if full:
            patches.enter_context(mock.patch("chunkft_compile.shallow.find_stack", return_value=None))
        for part, where in PARTS.items():
            owner, name = _resolve(where)
            patches.enter_context(mock.patch.object(owner, name, _timed(seconds, part, getattr(owner, name))))
        start = _cpu_seconds()
        model, optimizer = compile_and_plan(plain, backend, share)
        total = _cpu_seconds() - start
        while backend == "inductor" and model.progress.sweep == 0:
            train_step(model, optimizer, _batch())
    counts = {"copied": seconds["copied"], "steps a sweep": model.progress.steps, "total": total + seconds["Inductor"]}
    return counts | {part: seconds[part] for part in PARTS}


def _batch() -> Batch:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def _cpu_seconds() -> float:
    """Of this process and of those it has started and waited for: C++ compilers are."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _timed(seconds: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _cpu_seconds()
        result = function(*args, **kwargs)
        seconds[part] += _cpu_seconds() - start
        if part == "capture":
            seconds["copied"] = result.copied
        return result

    return timed


def _resolve(where: str) -> tuple[Any, str]:
    """The module or class that has a name, and the name."""
    path, _, name = where.rpartition(".")
    module, _, last = path.rpartition(".")
    if last[:1].isupper():
        return getattr(importlib.import_module(f"chunkft_compile.{module}"), last), name
    return importlib.import_module(f"chunkft_compile.{path}"), name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which depths, and how often."""
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 32], help="depths (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each depth (default: %(default)s)")
    parser.add_argument("--share", type=float, default=2.0, help="budget as a multiple of the weights (default: %(default)s)")
    parser.add_argument("--backend", choices=get_args(Backend), default="eager", help="of the compiled model (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="trace every layer")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    os.environ |= {"CHUNKFT_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    runs: dict[int, list[dict[str, float]]] = {layers: [] for layers in options.layers}
    for _ in range(options.repeats):
        for layers, done in runs.items():  # in turns, so that all depths see the same machine
            done.append(run_alone(measure, layers, full=options.full, backend=options.backend, share=options.share))
    found = {layers: min(done, key=lambda one: one["total"]) for layers, done in runs.items()}
    counts = ["copied", "steps a sweep"]
    names = ["total", *(part for part in PARTS if options.backend == "inductor" or part != "Inductor")]
    rows = [[name, *(f"{one[name]:.0f}" for one in found.values())] for name in counts]
    rows += [[name, *(f"{one[name]:.2f}" for one in found.values())] for name in names]
    print(tabulate(rows, headers=["CPU seconds", *(f"{layers} layers" for layers in found)], disable_numparse=True, stralign="right"))
    shape = f"Llama n x {HIDDEN}, vocabulary {VOCABULARY}, fp32, batch 1 x {TOKENS}, budget {options.share} x weights, {options.backend}"
    print(circumstances(f"{shape}; least of {options.repeats}"))


if __name__ == "__main__":
    main()
