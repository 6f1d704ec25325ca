"""What hidden set-ups put where a reader has a model and data: a tiny Llama with a token per byte, and texts that Python brings along."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257
END = 256  # its token


def tiny_model(layers: int = 2, hidden: int = 64) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY, eos_token_id=END, tie_word_embeddings=True)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model.train()  # type: ignore[no-any-return]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, and `<eos>`."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", **special)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, padding, and a chat template."""
    tokenizer = byte_tokenizer(pad_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def save_model(directory: str, **sizes: int) -> None:
    """As `save_pretrained` of a downloaded model would be."""
    tiny_model(**sizes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def save_text(path: str, characters: int = 20_000) -> None:
    """Of Python's documentation."""
    Path(path).write_text("\n".join(topics.values())[:characters])


def save_chats(path: str, count: int = 60) -> None:
    """Sums, as conversations."""
    with Path(path).open("w") as file:
        for a in range(count):
            said = [("user", f"{a} + {a + 3}"), ("assistant", f"{2 * a + 3}"), ("user", "and one more"), ("assistant", f"{2 * a + 4}")]
            print(json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}), file=file)


def batches(count: int, tokens: int = 64, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    """Of random tokens: inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(END, (count, rows, tokens), generator=generator)  # [batches, rows, tokens]
    return [{"input_ids": ids, "labels": ids} for ids in found]
