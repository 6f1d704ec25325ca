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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from tabulate import tabulate
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_compile
from benchmarks.common import Batch, circumstances, mb, run_alone, train_step
from tests.support.allocator import install

VOCABULARY, ROWS, TOKENS = 32000, 2, 256


@dataclass(frozen=True)
class Workload:
    """What both contestants train, and what ours is allowed."""

    layers: int
    budget: str
    fused: bool


@dataclass(frozen=True)
class Peak:
    """Bytes live at the worst moment of a whole sweep; `start_nbytes` is the same for what came before, planning included."""

    measured_nbytes: int
    predicted_nbytes: int
    start_nbytes: int
    steps: int


@dataclass(frozen=True)
class Times:
    """CPU seconds of each measured step; ours are one sweep."""

    ours: list[float]
    plain: list[float]


def build_model(layers: int) -> nn.Module:
    """An untied fp32 Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def build_batch() -> Batch:
    """Random tokens, to be predicted from those before them."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    return {"input_ids": ids, "labels": ids}


def build_plain(load: Workload) -> tuple[nn.Module, Optimizer]:
    """The baseline: every parameter at every step."""
    model = build_model(load.layers)
    return model, AdamW(model.parameters(), lr=1e-5, fused=True)


def build_ours(load: Workload) -> tuple[chunkft_compile.ChunkedModule, Optimizer]:
    """The same model, compiled."""
    model = chunkft_compile.compile(build_model(load.layers), budget=load.budget)
    return model, AdamW(model.parameters(), lr=1e-5, fused=load.fused)


def warm_up(model: chunkft_compile.ChunkedModule, optimizer: Optimizer, batch: Batch) -> int:
    """Train the first sweep; the number of its steps, known once the first call has planned."""
    train_step(model, optimizer, batch)
    steps = model.progress.steps
    for _ in range(steps - 1):
        train_step(model, optimizer, batch)
    return steps


def peak_of_plain(load: Workload) -> int:
    """Measured alone; the second step is the first with all optimizer state."""
    hook = install()
    model, optimizer = build_plain(load)
    batch = build_batch()
    train_step(model, optimizer, batch)
    hook.reset()
    train_step(model, optimizer, batch)
    return hook.peak()


def peak_of_ours(load: Workload) -> tuple[Peak, int]:
    """Measured alone; also what the planner computes for plain AdamW."""
    hook = install()
    model, optimizer = build_ours(load)
    batch = build_batch()
    steps = warm_up(model, optimizer, batch)
    start_nbytes = hook.peak()
    hook.reset()
    for _ in range(steps):
        train_step(model, optimizer, batch)
    peak = Peak(hook.peak(), model.plan(**batch).peak_nbytes, start_nbytes, steps)
    return peak, model.plain_peak_nbytes(**batch)


def time_both(load: Workload) -> Times:
    """Interleaved in one process."""
    ours, plain = build_ours(load), build_plain(load)
    batch = build_batch()
    train_step(*plain, batch)
    times = Times([], [])
    for _ in range(warm_up(*ours, batch)):
        times.ours.append(_cpu_seconds(lambda: train_step(*ours, batch)))
        times.plain.append(_cpu_seconds(lambda: train_step(*plain, batch)))
    return times


def _cpu_seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _table(load: Workload, plain_nbytes: int, plain_predicted_nbytes: int, peak: Peak, times: Times) -> str:
    ours_s, plain_s = fmean(times.ours), fmean(times.plain)
    rows = [
        ("plain AdamW(fused=True)", mb(plain_nbytes), "1.000", f"{plain_s:.2f}", "1.00", 1, mb(plain_predicted_nbytes)),
        (
            f"chunkft_compile, {load.budget}{', fused' if load.fused else ''}",
            mb(peak.measured_nbytes),
            f"{peak.measured_nbytes / plain_nbytes:.3f}",
            f"{ours_s:.2f}",
            f"{ours_s / plain_s:.2f}",
            peak.steps,
            mb(peak.predicted_nbytes),
        ),
    ]
    headers = ("method", "peak MB", "x bytes", "CPU s/step", "x time", "T", "predicted MB")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="880MB", help="budget of the compiled model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) for the compiled model too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    load = Workload(options.layers, options.budget, options.fused)

    plain_nbytes = run_alone(peak_of_plain, load)
    peak, plain_predicted_nbytes = run_alone(peak_of_ours, load)
    times = run_alone(time_both, load)
    where = circumstances(f"Llama {load.layers} x 768, vocabulary {VOCABULARY}, fp32, batch {ROWS} x {TOKENS}")
    if options.json:
        plain = {"measured_nbytes": plain_nbytes, "predicted_nbytes": plain_predicted_nbytes}
        print(json.dumps({"workload": asdict(load), "plain": plain, "ours": asdict(peak), "cpu_s": asdict(times), "where": where}))
        return
    print(_table(load, plain_nbytes, plain_predicted_nbytes, peak, times))
    sweep_s, plain_s = sum(times.ours), fmean(times.plain)
    print(f"\nEvery parameter trained once: {sweep_s:.1f} CPU s ({peak.steps} steps), plain AdamW {plain_s:.1f} s (1 step).")
    print(f"Peak before the measured sweep, planning included: {mb(peak.start_nbytes)} MB.")
    print(where)


if __name__ == "__main__":
    main()
