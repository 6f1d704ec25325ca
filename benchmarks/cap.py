"""The promise under a hard cap, twice: a device that has no more memory than the budget, and a process that may have no more data.

    python -m benchmarks.cap
    python -m benchmarks.cap --only process --layers 2 --budget 400MB
    python -m benchmarks.cap --only device --device-layers 2 --device-budget 420MB

Device: the simulated accelerator (tests/support/simdev.cpp) raises `OutOfMemoryError` beyond its capacity, which is set to the budget. Two
sweeps of ours must pass there; plain AdamW must not.

Process: after a first sweep the kernel's RLIMIT_DATA is set to the plan's peak, plus what the process has beside tensors at that moment
(libraries, the interpreter, the captured graph), plus a constant. The constant is for what grows later and is no tensor: pages that
tensors do not fill, Python objects. malloc must give every large block a mapping of its own, so that a block that is freed is data
no more: MALLOC_MMAP_THRESHOLD_=65536, MALLOC_ARENA_MAX=1, set here. One sweep must pass with the constant, and end as an ordinary
RuntimeError of torch's allocator where the limit is `--below` under the plan's peak; plain AdamW must end so at the very limit where ours
passed. Each try is a fork of the process that was warmed up, so the tries share a file of optimizer state: bytes are the question
here, not losses. Exits with 1 if an outcome is not the expected one.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch.optim import AdamW

from benchmarks.common import UPDATES, circumstances, compile_model, mb, run_alone, train_step
from benchmarks.contestants import PLAIN, Ours, Plain, Trainer
from benchmarks.llama import build_batch, build_model, describe
from chunkft_compile.budget import parse_amount
from chunkft_compile.runtime.allocators import install

MIB = 2**20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TRAINED = "trained"
_FAILURE = "RuntimeError: DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True)
class Try:
    """One contestant at one limit: where the limit is, what happened and what should."""

    cap: str
    contestant: str
    limit: str
    constant: str
    outcome: str
    expected: str

    @property
    def right(self) -> bool:
        """Whether it went as it should."""
        return self.expected in self.outcome


# ---- the device


def try_device(layers: int, budget_nbytes: int, update: str, *, plain: bool) -> str:
    """Train inside a capacity of `budget_nbytes`; what came of it. Must have its process for itself."""
    from tests.support.simdev import register  # makes `sim` the accelerator of the process

    device = register()
    model = build_model(layers).to("sim")
    batch = {name: tensor.to("sim") for name, tensor in build_batch().items()}
    if plain:
        device.configure(capacity=budget_nbytes, granularity=512)
        return _outcome(lambda: _train(Plain(model), batch, 1))
    device.configure(granularity=512)
    compiled = compile_model(model, budget_nbytes, update)
    optimizer = AdamW(compiled.parameters(), lr=1e-5)
    compiled.plan(**batch)
    device.configure(capacity=budget_nbytes, granularity=512)

    def sweeps() -> None:
        for _ in range(2 * compiled.progress.steps):
            train_step(compiled, optimizer, batch)

    return _outcome(sweeps)


def device_tries(layers: int, budget_nbytes: int, update: str) -> Iterator[Try]:
    """Ours and plain AdamW with the budget as capacity."""
    for name, plain, expected in ((f"ours, {update.upper()}", False, TRAINED), (PLAIN, True, "OutOfMemoryError")):
        outcome = run_alone(try_device, layers, budget_nbytes, update, plain=plain)
        yield Try("device", name, mb(budget_nbytes), "0", outcome, expected)


def _train(trainer: Trainer, batch: dict[str, torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        trainer.step(batch)


def _outcome(train: Callable[[], object]) -> str:
    try:
        train()
    except (RuntimeError, MemoryError) as error:
        # torch puts the failed check in front: [enforce fail at alloc_cpu.cpp:127] err == 0.
        return f"{type(error).__name__}: {re.sub(r'^.enforce fail.*?== 0. ', '', str(error).splitlines()[0])}"
    return TRAINED


# ---- the process


def data_nbytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux tells VmData"
    return int(found[1]) * 1024


def under_limit(limit_nbytes: int, train: Callable[[], object]) -> str:
    """What comes of `train` in a fork of this process that may have that much data; a crash is named by its signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_nbytes, limit_nbytes))
        outcome = _outcome(train)
        os.write(writing, outcome.encode()[:2000])
        os._exit(0 if outcome == TRAINED else 3)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return told if os.WIFEXITED(status) else f"killed by signal {os.WTERMSIG(status)}"


@dataclass(frozen=True)
class Room:
    """A process between two steps: the plan's peak, and data that is no tensor."""

    peak_nbytes: int
    beside_nbytes: int

    def limit(self, margin_nbytes: int) -> int:
        """RLIMIT_DATA that leaves `margin_nbytes` above the plan's peak."""
        return self.peak_nbytes + self.beside_nbytes + margin_nbytes


def try_ours(layers: int, budget_nbytes: int, update: str, margins: Sequence[int]) -> tuple[Room, list[str]]:
    """A sweep at each of the margins, and what came of it. Must have its process for itself."""
    hook = install()
    trainer, batch = Ours(layers, budget_nbytes, update, fused=True), build_batch()
    trainer.step(batch)
    for _ in range(trainer.steps - 1):
        trainer.step(batch)
    room = Room(trainer.model.plan(**batch).peak_nbytes, data_nbytes() - hook.live())
    return room, [under_limit(room.limit(margin), lambda: _train(trainer, batch, trainer.steps)) for margin in margins]


def try_plain(layers: int, limit_nbytes: int) -> str:
    """One step of plain AdamW. Must have its process for itself."""
    trainer, batch = Plain(build_model(layers)), build_batch()
    return under_limit(limit_nbytes, lambda: _train(trainer, batch, 1))


def process_tries(layers: int, budget_nbytes: int, update: str, margins: Sequence[int]) -> Iterator[Try]:
    """Ours at each margin: the first is the constant, the last is below the plan's peak, the others are told. Plain AdamW at the first."""
    room, outcomes = run_alone(try_ours, layers, budget_nbytes, update, margins)
    wanted = [TRAINED, *[""] * (len(margins) - 2), _FAILURE]
    name = f"ours, {update.upper()}, peak {mb(room.peak_nbytes)} + {mb(room.beside_nbytes)} beside tensors"
    for margin, outcome, expected in zip(margins, outcomes, wanted, strict=True):
        yield Try("process", name, mb(room.limit(margin)), f"{margin / MIB:+.1f}", outcome, expected)
    limit = room.limit(margins[0])
    yield Try("process", PLAIN, mb(limit), "same limit", run_alone(try_plain, layers, limit), _FAILURE)


def with_malloc(arguments: list[str]) -> None:
    """Start this program again where malloc was not told in time: it reads its settings once, before main()."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        command = [sys.executable, "-m", "benchmarks.cap", *arguments]
        sys.exit(subprocess.run(command, env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}).returncode)


def main() -> None:
    """Try everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("device", "process"), help="one of the two caps")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model under RLIMIT_DATA (default: %(default)s)")
    parser.add_argument("--budget", default="760MB", help="its budget (default: %(default)s)")
    parser.add_argument("--device-layers", type=int, default=2, help="blocks of the model on the device (default: %(default)s)")
    parser.add_argument("--device-budget", default="420MB", help="its budget, the device's capacity (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, default="immediate", help="when gradients are applied (default: %(default)s)")
    parser.add_argument("--constant", default="8MiB", help="bytes of the process beside the plan's (default: %(default)s)")
    parser.add_argument("--below", default="2MiB", help="how far below the plan's peak it must fail (default: %(default)s)")
    parser.add_argument("--also", type=float, nargs="*", default=[4, 2, 1, 0, -1], help="further margins in MiB (default: 4 2 1 0 -1)")
    options = parser.parse_args()
    with_malloc(sys.argv[1:])
    torch.set_num_threads(1)
    found: list[Try] = []
    if options.only != "process":
        found += device_tries(options.device_layers, parse_amount(options.device_budget, "--device-budget"), options.update)
    if options.only != "device":
        constant, below = parse_amount(options.constant, "--constant"), parse_amount(options.below, "--below")
        margins = [constant, *(int(margin * MIB) for margin in options.also), -below]
        found += process_tries(options.layers, parse_amount(options.budget, "--budget"), options.update, margins)
    rows = [
        (t.cap, t.contestant, t.limit, t.constant, t.outcome[:70], t.expected.partition(":")[0], "" if t.right else "WRONG") for t in found
    ]
    headers = ("cap", "contestant", "limit MB", "above the plan's peak, MiB", "outcome", "expected", "")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", "right", "right", "left", "left", "left")))
    shapes = [f"process: {describe(options.layers)}", f"device: {options.device_layers} layers of the same"]
    print(circumstances("; ".join(shapes)))
    sys.exit(not all(t.right for t in found))


if __name__ == "__main__":
    main()
