"""A training loop in plain PyTorch, in which one line makes the model stay inside a byte budget.

python examples/plain_loop.py
python examples/plain_loop.py --model ./SmolLM2-135M --budget 900MB
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers

import chunkft_compile


def main() -> None:
    """Train on the documentation of Python, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a causal language model of Hugging Face (default: a tiny one with random weights)")
    parser.add_argument("--budget", default="8MB", help="for weights, gradients, optimizer state and activations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()

    plain, tokens = load(args.model)
    batches = tokens[: len(tokens) // 128 * 128].view(-1, 1, 128)  # [batches, 1, 128]

    model = chunkft_compile.compile(plain, budget=args.budget)  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if args.model is None else 1e-4)
    for step in range(args.steps):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    plain_nbytes = model.plain_peak_nbytes(input_ids=batches[0], labels=batches[0])
    print(f"{len(model.chunks)} chunks, {model.progress.steps} steps a sweep, budget {model.budget_nbytes / 1e6:.1f} MB")
    assert model.schedule is not None, "it was trained"
    print(f"predicted peak {model.schedule.peak_nbytes / 1e6:.1f} MB, plain AdamW needs {plain_nbytes / 1e6:.1f} MB")


def load(path: str | None) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and a text as tokens: bytes where there is no tokenizer."""
    text = "\n".join(topics.values())
    if path is None:
        torch.manual_seed(0)
        sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=256)
        return transformers.LlamaForCausalLM(config).train(), torch.tensor(list(text.encode()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.train(), tokenizer(text, return_tensors="pt").input_ids[0]


if __name__ == "__main__":
    main()
