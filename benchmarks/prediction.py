"""Predicted against measured peak memory: three models, three budgets each.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --model gpt2 --fraction 0.5

A budget is `smallest + fraction x (plain - smallest)`: between the smallest feasible one and what plain AdamW needs. The peak
of every step of the second sweep is measured as the exact number of live tensor bytes, each case alone in a process.
Exits with 1 if a step needs more than predicted for it or more than the budget, if the prediction is more than 2 % above the
measured maximum, or if a budget is refused.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import chunkft_compile
from benchmarks.common import Batch, circumstances, mb, run_alone, train_step
from tests.support.allocator import install

SLACK = 1.02
VOCABULARY, HIDDEN, ROWS, TOKENS = 8000, 256, 4, 128


@dataclass(frozen=True)
class Case:
    """One model in one budget: predicted and measured peak of each step of a sweep, or the refusal."""

    model: str
    budget_nbytes: int
    predicted: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, or what is wrong."""
        if self.refusal:
            return self.refusal
        over = sum(measured > predicted for measured, predicted in zip(self.measured, self.predicted, strict=True))
        if over:
            return f"{over} steps over their prediction"
        if max(self.measured) > self.budget_nbytes:
            return "over budget"
        if max(self.predicted) > SLACK * max(self.measured):
            return "predicted too high"
        return "ok"


def _tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, TOKENS))


def tied_llama() -> tuple[nn.Module, Batch]:
    """Grouped heads, head tied to the embedding."""
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=HIDDEN,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
    )
    ids = _tokens()
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2() -> tuple[nn.Module, Batch]:
    """Conv1D layers, learned positions, dropout 0.1, tied head."""
    config = GPT2Config(
        n_layer=4, n_embd=HIDDEN, n_head=8, vocab_size=VOCABULARY, n_positions=TOKENS, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    config.loss_type = "ForCausalLM"
    ids = _tokens()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def bert() -> tuple[nn.Module, Batch]:
    """An encoder with padding, dropout 0.1, a pooler and a classifier of two classes."""
    config = BertConfig(
        num_hidden_layers=4,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    attended = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [100], [64], [17]])).long()
    return BertForSequenceClassification(config), {"input_ids": _tokens(), "attention_mask": attended, "labels": torch.randint(2, (ROWS,))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {"llama-tied": tied_llama, "gpt2": gpt2, "bert-classifier": bert}


def _build(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(), batch


def budget_range(name: str) -> tuple[int, int]:
    """The smallest feasible budget and the peak of plain AdamW, in bytes."""
    module, batch = _build(name)
    plain_nbytes = chunkft_compile.compile(module, budget="1TB").plain_peak_nbytes(**batch)
    module, batch = _build(name)
    try:
        chunkft_compile.compile(module, budget="1MB").plan(**batch)
    except chunkft_compile.BudgetError as error:
        return error.smallest_nbytes, plain_nbytes
    raise AssertionError(f"{name} was planned in 1 MB, less than its weights")


def measure(name: str, budget_nbytes: int) -> Case:
    """Train two sweeps; the second is measured step by step."""
    hook = install()
    module, batch = _build(name)
    try:
        model = chunkft_compile.compile(module, budget=budget_nbytes)
        optimizer = AdamW(model.parameters(), lr=1e-5)
        train_step(model, optimizer, batch)
    except chunkft_compile.BudgetError as error:
        return Case(name, budget_nbytes, refusal=f"refused: {error}")
    steps = model.progress.steps
    for _ in range(steps - 1):
        train_step(model, optimizer, batch)
    predicted, measured = [], []
    for _ in range(steps):
        predicted.append(model.progress.predicted_nbytes)
        hook.reset()
        train_step(model, optimizer, batch)
        measured.append(hook.peak())
    return Case(name, budget_nbytes, tuple(predicted), tuple(measured))


def _row(case: Case) -> tuple[object, ...]:
    if case.refusal:
        return case.model, mb(case.budget_nbytes), "", "", "", "", case.verdict
    predicted, measured = max(case.predicted), max(case.measured)
    ratio = f"{predicted / measured:.6f}"
    return case.model, mb(case.budget_nbytes), len(case.measured), mb(predicted), mb(measured), ratio, case.verdict


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only this model; may be repeated")
    parser.add_argument("--fraction", type=float, action="append", help="only this fraction; may be repeated (default: 0, 0.1, 0.5)")
    options = parser.parse_args()

    cases = []
    for name in options.model or MODELS:
        smallest, plain = run_alone(budget_range, name)
        cases += [run_alone(measure, name, smallest + int(f * (plain - smallest))) for f in options.fraction or (0.0, 0.1, 0.5)]
    headers = ("model", "budget MB", "T", "predicted MB", "measured MB", "predicted / measured", "verdict")
    print(tabulate([_row(case) for case in cases], headers, disable_numparse=True, colalign=("left", *["right"] * 5, "left")))
    print(f"\n{circumstances(f'4 layers x {HIDDEN}, vocabulary {VOCABULARY}, fp32, batch {ROWS} x {TOKENS}, AdamW')}")
    sys.exit(any(case.verdict != "ok" for case in cases))


if __name__ == "__main__":
    main()
