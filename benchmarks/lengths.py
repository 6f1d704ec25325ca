"""Training with batches of many lengths: how often the model was captured, planned and lowered.

    python -m benchmarks.lengths                      # 200 batches of 17 to 512 tokens, shuffled
    python -m benchmarks.lengths --batches 40 --layers 2

A small Llama trains twice on the same batches: once after `model.plan` of the longest one, once without, so that every batch longer than
all before it is a new largest one. Printed are the counts of `model.counts`, the graphs that Dynamo itself counted, how many batches
were longer than all before, and the seconds until the first batch was done and of the median batch of the second half. Every instruction
is held to its promised bytes meanwhile, as always.
"""

import argparse
import random
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Batch, circumstances, run_alone, train_step
from chunkft_compile import compile
from chunkft_compile.budget import parse_budget

ROWS, SHORTEST, LONGEST, VOCABULARY, HIDDEN = 2, 17, 512, 2000, 128


def build_model(layers: int) -> nn.Module:
    """A Llama with random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=HIDDEN,
        intermediate_size=352,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
    )
    trained: nn.Module = LlamaForCausalLM(config).train()
    return trained


def draw_lengths(batches: int) -> list[int]:
    """As many lengths, the shortest and the longest among them."""
    drawn = random.Random(0)
    lengths = [SHORTEST, LONGEST, *(drawn.randint(SHORTEST, LONGEST) for _ in range(batches - 2))]
    drawn.shuffle(lengths)
    return lengths


def build_batch(length: int, seed: int) -> Batch:
    """Random tokens, to be predicted from those before them: [ROWS, length]."""
    ids = torch.randint(VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(layers: int, batches: int, budget_nbytes: int, planned: bool) -> dict[str, Any]:
    """Train on all batches; gives what the table shows."""
    model = compile(build_model(layers), budget_nbytes)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    lengths = draw_lengths(batches)
    start = time.perf_counter()
    if planned:
        model.plan(**build_batch(LONGEST, 0))
    seconds: list[float] = []
    half: dict[str, int] = {}
    largest = maxima = 0
    for seed, length in enumerate(lengths):
        maxima, largest = maxima + (length > largest), max(length, largest)
        batch = build_batch(length, seed)
        before = time.perf_counter()
        train_step(model, optimizer, batch)
        seconds.append(time.perf_counter() - (before if seed else start))
        if seed == batches // 2:
            half = asdict(model.counts)
    traced: dict[str, int] = torch._dynamo.utils.counters["stats"]  # private (2.13.0): what Dynamo itself counts
    return {
        "largest first": "yes" if planned else "no",
        "lengths": len(set(lengths)),
        "new maxima": 0 if planned else maxima,
        **asdict(model.counts),
        "codes at half time": half["codes"],
        "Dynamo graphs": traced.get("unique_graphs", 0),
        "steps": model.progress.steps,
        "first s": f"{seconds[0]:.1f}",
        "median s": f"{median(seconds[batches // 2 :]):.3f}",
    }


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="batches of each run, at least 2 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--budget", default="24MB", help="budget (default: %(default)s)")
    options = parser.parse_args()
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    rows = [run_alone(train, options.layers, options.batches, budget_nbytes, planned) for planned in (True, False)]
    print(tabulate([[key, *(row[key] for row in rows)] for key in rows[0]], disable_numparse=True, colalign=("left", "right", "right")))
    shape = (
        f"Llama {options.layers} x {HIDDEN}, vocabulary {VOCABULARY}, fp32, batch {ROWS} x {SHORTEST}..{LONGEST}, budget {options.budget}"
    )
    print(circumstances(shape))


if __name__ == "__main__":
    main()
