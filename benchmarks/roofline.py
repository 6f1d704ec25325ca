"""How far the roofline is from measured operators: predicted over measured time, by operator and in total, on this CPU.

    python -m benchmarks.roofline --hidden 512 --layers 4 --batch 2 --seq 256

Every call of the lowered forward and backward of a small Llama is counted as often as it occurs in the captured graph.
Exits with 1 if the total is off by more than `--limit`.
"""

import argparse
import sys
from collections import defaultdict

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import circumstances
from chunkft_compile.capture import capture
from chunkft_compile.costs import OperatorCosts, makes_bytes
from chunkft_compile.planner.devices import find_device
from chunkft_compile.roofline import RooflineCosts
from chunkft_compile.temporaries import operator_name

_LARGE_US = 200  # small calls are dispatch, and noise


def main() -> int:
    """Print the table; the exit code."""
    args = _arguments()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocab,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).train()
    ids = torch.zeros(args.batch, args.seq, dtype=torch.int64)
    graph = capture(model, (), {"input_ids": ids, "labels": ids, "use_cache": False}).graph
    measured, predicted = OperatorCosts(torch.device("cpu")), RooflineCosts(find_device("cpu"))
    measured.measure([graph])
    predicted.measure([graph])
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for node in graph.nodes:
        if makes_bytes(node):
            row = rows[operator_name(node)]
            figures = (1, measured.us(node), predicted.us(node), measured.temporary_nbytes(node), predicted.temporary_nbytes(node))
            row[:3] = [a + b for a, b in zip(row[:3], figures[:3], strict=True)]
            row[3:] = [max(a, b) for a, b in zip(row[3:], figures[3:], strict=True)]
    total = [sum(row[i] for row in rows.values()) for i in range(3)]
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    table = [[name, *_shown(row)] for name, row in ordered if row[1] >= _LARGE_US]
    rest = [row for _, row in ordered if row[1] < _LARGE_US]
    table.append([f"{len(rest)} others", *_shown([*(sum(row[i] for row in rest) for i in range(3)), 0, 0])])
    table.append(["total", *_shown([*total, 0, 0])])
    print(tabulate(table, headers=["operator", "calls", "measured ms", "predicted ms", "ratio", "temporary kB", "predicted kB"]))
    print(circumstances(f"Llama {args.layers} x {args.hidden}, vocabulary {args.vocab}, {args.batch} x {args.seq}, {args.dtype}"))
    return 0 if 1 / args.limit <= total[2] / total[1] <= args.limit else 1


def _shown(row: list[int]) -> list[object]:
    calls, measured, predicted, temporary, modelled = row
    return [
        calls,
        f"{measured / 1e3:.2f}",
        f"{predicted / 1e3:.2f}",
        f"{predicted / max(measured, 1):.2f}",
        f"{temporary / 1e3:.1f}",
        f"{modelled / 1e3:.1f}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("hidden", 512), ("layers", 4), ("vocab", 32000), ("batch", 2), ("seq", 256)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=2.0, help="largest ratio of the totals, either way (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
