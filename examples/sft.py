"""TRL's SFTTrainer inside a byte budget: prompts and answers, with the loss on the answers.

python examples/sft.py --out /tmp/sums
python examples/sft.py --out /tmp/sums --model ./SmolLM2-135M --budget 900MB
"""

import argparse
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer.sft_config import SFTConfig

import chunkft_compile
from chunkft_compile.integrations.trl import ChunkedSFTTrainer


def main() -> None:
    """Teach sums of two digits, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--model", metavar="DIR", help="a causal language model of Hugging Face (default: a tiny one with random weights)")
    parser.add_argument("--budget", default="7MB", help="for weights, gradients, optimizer state and activations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()

    plain, tokenizer = load(args.model)
    data = Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)])

    model = chunkft_compile.compile(plain, budget=args.budget)
    settings = SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3 if args.model is None else 1e-4,
        logging_steps=20,
        activation_checkpointing=False,  # the plan decides
        bf16=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ChunkedSFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    print(f"{type(plain).from_pretrained(args.out).num_parameters()} parameters in {args.out}, all of them trained in {args.budget}")


def load(path: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer; the tiny one has a word for each digit and sign."""
    if path is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(path)
    words = ["<pad>", "<eos>", *"0123456789+="]
    whole = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=len(words))), tokenizer


if __name__ == "__main__":
    main()
