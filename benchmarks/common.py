"""What the benchmarks share: a training step, a process of its own for each contestant, and the line of circumstances."""

import datetime
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

import chunkft_compile

UPDATES = ("held", "auto", "immediate")
"""What `compile` may choose for the updates of a step; see `chunkft_compile.compile`."""

Batch = dict[str, torch.Tensor]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def train_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    """One step of the ordinary training loop."""
    loss = model(**batch).loss
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def compile_model(
    model: nn.Module, budget: str | int, update: str = "held", backend: str = "eager", *, resident: bool = False
) -> chunkft_compile.ChunkedModule:
    """`chunkft_compile.compile`; HELD updates are its default and are not asked for. `resident` weights stay on the device."""
    options: dict[str, Any] = {"backend": backend} | ({} if update == "held" else {"update": update})
    options |= {"weights": ["device"]} if resident else {}
    return chunkft_compile.compile(model, budget=budget, **options)


def cpu_seconds(call: Callable[[], None]) -> float:
    """CPU time of a call, of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def run_alone(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """`function(...)` in a fresh process with one torch thread, so that contestants share neither memory nor warm caches."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *args, **kwargs).result()


def mb(nbytes: int) -> str:
    """Megabytes (1e6) for a table."""
    return f"{nbytes / 1e6:.1f}"


def circumstances(shape: str, threads: int = 1) -> str:
    """Where and when this was measured."""
    parts = [f"{_processor()}, {platform.system()}", f"torch {torch.__version__}", f"{threads} thread{'s' if threads > 1 else ''}", shape]
    return "; ".join([*parts, datetime.date.today().isoformat(), f"commit {_commit()}"])


def _processor() -> str:
    """The model name that Linux reports, else what Python knows."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Short hash of the checkout, with a `+` if files differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit}{'+' if _git('status', '--porcelain') else ''}" if commit else "none"


def _git(*arguments: str) -> str:
    """Output of a git command that only reads; empty if it fails, outside a checkout for example."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
