"""The benchmark model: an untied Llama with random weights, 134M parameters in 12 layers, and its batch."""

import argparse

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import UPDATES, Batch

HIDDEN, WIDE, VOCABULARY, ROWS, TOKENS = 768, 2048, 32000, 2, 256


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(layers: int, dtype: str = "fp32", *, checkpointing: bool = False) -> nn.Module:
    """The model in training mode, with the same weights every time; transformers' own checkpointing of each block if wanted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, DTYPES[dtype])
    if checkpointing:
        # Named gradient_checkpointing_enable before transformers 5.24. It also makes the output of a frozen embedding require a gradient,
        # which only reentrant checkpointing needs: backward would run down to it, and rotation would lose its early stop.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    trained: nn.Module = model.train()
    return trained


def build_batch() -> Batch:
    """Random tokens, to be predicted from those before them: [ROWS, TOKENS]."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    return {"input_ids": ids, "labels": ids}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The size of the model, its dtype, and how ours trains it."""
    parser.add_argument("--budget", default="880MB", help="budget of the compiled model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")


def describe(layers: int, dtype: str = "fp32") -> str:
    """The workload, for the line of circumstances."""
    return f"Llama {layers} x {HIDDEN}, vocabulary {VOCABULARY}, {dtype}, batch {ROWS} x {TOKENS}"
