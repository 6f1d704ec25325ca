"""Steps of a Llama-2-7B-shaped model on this machine: weights on the device, and weights streamed from the disk.

    python -m benchmarks.seven_b --work /scratch
    python -m benchmarks.seven_b --work /scratch --layers 4 --resident 3GB --streamed 2GB --tokens 256

Random bf16 weights are written to `--work` in shards once (13.5 GB; it needs about 45 GB free). Each case is a process of its own that
opens them with `chunkft_compile.load`, plans, and trains single steps of its sweep with `AdamW(fused=True)`, gradients HELD unless
`--update` says otherwise: one of the shallowest, one in the middle and one of the deepest with resident weights, one of the deepest with
streamed ones. A plan may have its steps in any order, so the chosen ones are put first. They find no optimizer state to fetch; `--again`
goes on to the same steps of the next sweep, which do (it needs 27 GB more). Measured: the exact number of live tensor bytes, the growth
of the process (VmHWM over its RSS before the weights were opened, mapped files included), wall seconds, bytes moved, and the share of
transfer time that computing did not wait for; below each row what it waited for, phase by phase (see `benchmarks.overlap`). The process
uses `--threads` and returns freed memory at once (MALLOC_MMAP_THRESHOLD_). Exits with 1 if a step takes more than predicted.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_compile
from benchmarks.common import UPDATES, circumstances, train_step
from benchmarks.overlap import Recorder, Tape, summary
from chunkft_compile.budget import parse_budget
from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Plan, Step, from_json
from chunkft_compile.runtime.allocators import install

GIB = 1 << 30
HEADERS = ("weights", "budget GiB", "step", "of T", "chunks", "predicted GiB", "measured GiB", "growth GiB", "wall s", "moved GB", "hidden")


@dataclass(frozen=True)
class Row:
    """One step."""

    weights: str
    budget_nbytes: int
    step: str
    steps: int
    chunks: int
    predicted_nbytes: int
    measured_nbytes: int
    growth_nbytes: int
    seconds: float
    moved_nbytes: int
    hidden: float

    @property
    def cells(self) -> tuple[object, ...]:
        """For the table."""
        sizes = (f"{nbytes / GIB:.3f}" for nbytes in (self.predicted_nbytes, self.measured_nbytes, self.growth_nbytes))
        rest = (f"{self.seconds:.1f}", f"{self.moved_nbytes / 1e9:.2f}", f"{self.hidden:.1%}")
        return self.weights, f"{self.budget_nbytes / GIB:.2f}", self.step, self.steps, self.chunks, *sizes, *rest


def write_checkpoint(directory: Path, layers: int) -> None:
    """Random weights of the shape of Llama-2-7B, one shard for each block and one for the rest."""
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(  # the defaults of transformers are Llama-2-7B
        num_hidden_layers=layers, vocab_size=32000, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for number, (shard, names) in enumerate(shards.items()):
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, directory / f"model-{number:05}-{shard}.safetensors", {"format": "pt"})
    config.save_pretrained(directory)  # last: a directory that has it is complete


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def measure(
    work: Path,
    checkpoint: Path,
    budget_nbytes: int,
    weights: str,
    tokens: int,
    wanted: tuple[str, ...],
    settings: dict[str, Any],
    again: bool,
) -> list[Row]:
    """Train the wanted steps of one plan; with `again` also those of the next sweep, whose optimizer state comes from the store."""
    hook = install()
    torch.manual_seed(0)
    ids = torch.randint(32000, (1, tokens))
    batch = {"input_ids": ids, "labels": ids}
    before = _status("VmRSS")
    settings |= {"store": work, "weights": ["device"] if weights == "resident" else ["disk"]}
    plan = _planned(checkpoint, budget_nbytes, batch, settings)
    chosen = _choose(plan, wanted)
    print(f"{weights}: {len(plan.schedule.steps)} steps a sweep, {plan.schedule.sweep_us / 1e6:.0f} s of it predicted", flush=True)
    model = chunkft_compile.load(checkpoint, schedule=_reordered(plan, [number for _, number in chosen]), store=work)
    optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)
    model.plan(**batch)
    recorder, rows = Recorder(model), []
    for sweep in ("", ", again") if again else ("",):
        for name, number in chosen:
            step = plan.schedule.steps[number]
            tape, growth_nbytes = _train_one(model, optimizer, batch, recorder, hook, before)
            total = tape.moved.read_nbytes + tape.moved.written_nbytes
            peaks = tape.predicted_nbytes, tape.measured_nbytes, growth_nbytes
            seconds = (tape.stop_ns - tape.start_ns) / 1e9
            steps = len(plan.schedule.steps)
            rows.append(Row(weights, budget_nbytes, name + sweep, steps, len(step.chunks), *peaks, seconds, total, tape.moved.hidden))
            print(f"{tabulate([rows[-1].cells], HEADERS)}\n\n{summary(tape)}\n", flush=True)
        if again and not sweep:
            for _ in range(len(plan.schedule.steps) - len(chosen)):
                train_step(model, optimizer, batch)
    return rows


def _train_one(
    model: ChunkedModule, optimizer: AdamW, batch: dict[str, torch.Tensor], recorder: Recorder, hook: Any, before: int
) -> tuple[Tape, int]:
    """One step, and the growth of the process in it."""
    gc.collect()
    hook.reset()
    Path("/proc/self/clear_refs").write_text("5")  # a new VmHWM
    tape = recorder.record(model, optimizer, batch)
    tape.measured_nbytes = hook.peak()
    return tape, _status("VmHWM") - before


def _planned(checkpoint: Path, budget_nbytes: int, batch: dict[str, torch.Tensor], settings: dict[str, Any]) -> Plan:
    """The plan for this batch, by a model that is dropped again."""
    model = chunkft_compile.load(checkpoint, budget_nbytes, **settings)
    optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)
    model.plan(**batch)
    path = settings["store"] / f"plan-{os.getpid()}.json"
    model.save_schedule(path)
    del model, optimizer
    gc.collect()
    plan = from_json(path.read_text(encoding="utf-8"), Plan)
    path.unlink()
    return plan


def _choose(plan: Plan, wanted: tuple[str, ...]) -> list[tuple[str, int]]:
    """The wanted steps by how deep they go: shallow, middle, deepest."""

    def depth(step: Step) -> int:
        return min(plan.problem.chunks[chunk].segment for chunk in step.chunks)

    order = sorted(range(len(plan.schedule.steps)), key=lambda number: -depth(plan.schedule.steps[number]))
    places = {"shallow": 0, "middle": len(order) // 2, "deepest": len(order) - 1}
    return [(name, order[places[name]]) for name in wanted]


def _reordered(plan: Plan, first: list[int]) -> Plan:
    order = tuple(dict.fromkeys([*first, *range(len(plan.schedule.steps))]))
    steps, traces = tuple(plan.schedule.steps[number] for number in order), tuple(plan.traces[number] for number in order)
    return replace(plan, schedule=replace(plan.schedule, steps=steps), traces=traces)


def _status(field: str) -> int:
    """Bytes of a line in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Run both cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory on a real disk")
    parser.add_argument("--layers", type=int, default=32, help="fewer, to try it out (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the one sequence (default: %(default)s)")
    parser.add_argument("--resident", default="13.3GiB", help="budget with resident weights (default: %(default)s)")
    parser.add_argument("--streamed", default="6GiB", help="budget with streamed weights (default: %(default)s)")
    parser.add_argument("--only", choices=("resident", "streamed"), help="only this case")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="also the same steps in the next sweep, with state in the store")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    options = parser.parse_args()

    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    checkpoint = options.work / f"llama-7b-shaped-{options.layers}"
    write_checkpoint(checkpoint, options.layers)
    cases = {"resident": (options.resident, ("shallow", "middle", "deepest")), "streamed": (options.streamed, ("deepest",))}
    rows: list[Row] = []
    for weights, (budget, wanted) in cases.items():
        if options.only in (None, weights):
            nbytes = parse_budget(budget, torch.device("cpu"))
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(options.threads,)) as pool:
                settings = {} if options.update == "held" else {"update": options.update}
                arguments = options.work, checkpoint, nbytes, weights, options.tokens, wanted, settings, options.again
                rows += pool.submit(measure, *arguments).result()
    print()
    print(tabulate([row.cells for row in rows], HEADERS, disable_numparse=True))
    shape = f"Llama-2-7B shape, {options.layers} layers, bf16, 1 x {options.tokens}, AdamW fused"
    print(circumstances(shape, options.threads))
    sys.exit(any(row.measured_nbytes > row.predicted_nbytes for row in rows))


if __name__ == "__main__":
    main()
