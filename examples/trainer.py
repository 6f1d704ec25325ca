"""The Trainer of transformers inside a byte budget: checkpoints, evaluation and logs are its own.

python examples/trainer.py --out /tmp/trained
python examples/trainer.py --out /tmp/trained --steps 120 --resume          # goes on bit by bit
python examples/trainer.py --out /tmp/tuned --model ./SmolLM2-135M --budget 900MB
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers

import chunkft_compile
from chunkft_compile.integrations.transformers import ChunkedTrainer


def main() -> None:
    """Train on the documentation of Python, evaluate on a part of it, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints and the model go")
    parser.add_argument("--model", metavar="DIR", help="a causal language model of Hugging Face (default: a tiny one with random weights)")
    parser.add_argument("--budget", default="7MB", help="for weights, gradients, optimizer state and activations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args()

    plain, tokens = load(args.model)
    rows: Any = [{"input_ids": ids, "labels": ids} for ids in tokens[: len(tokens) // 128 * 128].view(-1, 128)]

    model = chunkft_compile.compile(plain, budget=args.budget)
    settings = transformers.TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=3e-3 if args.model is None else 1e-4,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=60,
        save_steps=60,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ChunkedTrainer(model=model, args=settings, train_dataset=rows[:-16], eval_dataset=rows[-16:])
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    print(f"{type(plain).from_pretrained(args.out).num_parameters()} parameters in {args.out}, all of them trained in {args.budget}")


def load(path: str | None) -> tuple[Any, torch.Tensor]:
    """The model, and a text as tokens: bytes where there is no tokenizer."""
    text = "\n".join(topics.values())
    if path is None:
        torch.manual_seed(0)
        sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=256)
        return transformers.LlamaForCausalLM(config), torch.tensor(list(text.encode()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, tokenizer(text, return_tensors="pt").input_ids[0]


if __name__ == "__main__":
    main()
