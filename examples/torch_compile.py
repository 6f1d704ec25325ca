"""The same as a backend of torch.compile: the loop keeps its model, its optimizer and its parameters.

python examples/torch_compile.py
python examples/torch_compile.py --model ./SmolLM2-135M --budget 900MB
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers

from chunkft_compile.dynamo import chunked_of


def main() -> None:
    """Train on the documentation of Python, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a causal language model of Hugging Face (default: a tiny one with random weights)")
    parser.add_argument("--budget", default="8MB", help="for weights, gradients, optimizer state and activations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()

    plain, tokens = load(args.model)
    plain.config.use_cache = False
    batches = tokens[: len(tokens) // 128 * 128].view(-1, 1, 128)  # [batches, 1, 128]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = plain(input_ids=ids, labels=ids).loss
        return loss

    train = torch.compile(loss_of, backend="chunkft", options={"budget": args.budget})  # the one line
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3 if args.model is None else 1e-4)
    for step in range(args.steps):
        loss = train(batches[step % len(batches)])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)  # these are chunks now
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    chunked = chunked_of(plain)
    assert chunked.schedule is not None, "it was trained"
    print(f"{chunked.progress.steps} steps a sweep, predicted peak {chunked.schedule.peak_nbytes / 1e6:.1f} MB of {args.budget}")


def load(path: str | None) -> tuple[Any, torch.Tensor]:
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
