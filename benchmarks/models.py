"""Small models of many kinds, random weights, each with a batch: what the benchmarks of prediction and of the solver train."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional

from benchmarks.common import Batch

VOCABULARY, HIDDEN, LAYERS, ROWS, TOKENS = 8000, 256, 4, 4, 128
CLASSES, PIXELS, FEATURES = 10, 64, 512

_DECODER: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}


class Output(NamedTuple):
    """What the plain models return, so that the same loop trains them."""

    loss: torch.Tensor


def build(name: str) -> tuple[nn.Module, Batch]:
    """The model of this name in training mode and its batch, the same ones every time."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(), batch


def _text() -> Batch:
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    return {"input_ids": ids, "labels": ids}


def llama(*, tied: bool) -> tuple[nn.Module, Batch]:
    """Grouped heads; the head is tied to the embedding or not."""
    config = transformers.LlamaConfig(**_DECODER, num_key_value_heads=4, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config), _text()


def gpt2() -> tuple[nn.Module, Batch]:
    """Conv1D layers, learned positions, dropout 0.1, tied head."""
    sizes: dict[str, Any] = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 8, "vocab_size": VOCABULARY, "n_positions": TOKENS}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config), _text()


def bert() -> tuple[nn.Module, Batch]:
    """An encoder with padding, dropout 0.1, a pooler and a classifier of two classes."""
    config = transformers.BertConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    attended = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [100], [64], [17]])).long()
    ids, labels = torch.randint(VOCABULARY, (ROWS, TOKENS)), torch.randint(2, (ROWS,))
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": attended, "labels": labels}


def qwen3() -> tuple[nn.Module, Batch]:
    """Normalised queries and keys, grouped heads."""
    config = transformers.Qwen3Config(**_DECODER, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config), _text()


def gemma3() -> tuple[nn.Module, Batch]:
    """Sliding and full attention in turn, four norms a block, scaled embedding, tied head."""
    config = transformers.Gemma3TextConfig(**_DECODER, num_key_value_heads=4, head_dim=32, sliding_window=32)
    return transformers.Gemma3ForCausalLM(config), _text()


def opt() -> tuple[nn.Module, Batch]:
    """Biases everywhere, learned positions, dropout 0.1."""
    config = transformers.OPTConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_dim=1024,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        word_embed_proj_dim=HIDDEN,
        use_cache=False,
    )
    return transformers.OPTForCausalLM(config), _text()


def neox() -> tuple[nn.Module, Batch]:
    """Attention and MLP side by side, fused query-key-value, partial rotary."""
    config = transformers.GPTNeoXConfig(**{**_DECODER, "intermediate_size": 1024}, max_position_embeddings=TOKENS)
    return transformers.GPTNeoXForCausalLM(config), _text()


def t5() -> tuple[nn.Module, Batch]:
    """Encoder and decoder, one embedding for both and the head, relative positions shared by the blocks."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_decoder_layers": 2, "d_model": HIDDEN, "d_kv": 32, "d_ff": 1024, "num_heads": 8}
    config = transformers.T5Config(**sizes, vocab_size=VOCABULARY, use_cache=False)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config), _text()


def vit() -> tuple[nn.Module, Batch]:
    """Patches of an image, a class token, no vocabulary."""
    config = transformers.ViTConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_attention_heads=8,
        image_size=PIXELS,
        patch_size=8,
    )
    config.num_labels = CLASSES
    return transformers.ViTForImageClassification(config), _images()


def _images() -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, PIXELS, PIXELS), "labels": torch.randint(CLASSES, (ROWS,))}


class Mlp(nn.Module):
    """Wide layers without a repeated stack: the graph is cut where a single tensor flows."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [FEATURES, 2048, 1024, 1024, 512]
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)])
        self.head = nn.Linear(sizes[-1], CLASSES)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Output:
        """Features and classes: [ROWS, FEATURES], [ROWS]."""
        return Output(functional.cross_entropy(self.head(self.layers(inputs)), labels))


def mlp() -> tuple[nn.Module, Batch]:
    """Linear layers and GELU."""
    return Mlp(), {"inputs": torch.randn(64, FEATURES), "labels": torch.randint(CLASSES, (64,))}


class ConvNet(nn.Module):
    """Convolutions, group norms and one residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 64, 3, padding=1)
        self.stages = nn.ModuleList([nn.Conv2d(64, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 2, 1), nn.Conv2d(256, 256, 3, 1, 1)])
        self.norms = nn.ModuleList([nn.GroupNorm(8, width) for width in (128, 256, 256)])
        self.head = nn.Linear(256, CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        """Images and classes: [ROWS, 3, PIXELS, PIXELS], [ROWS]."""
        x = functional.relu(self.enter(pixel_values))
        for conv, norm in zip(self.stages, self.norms, strict=True):
            y = functional.relu(norm(conv(x)))
            x = x + y if x.shape == y.shape else y
        return Output(functional.cross_entropy(self.head(x.mean((2, 3))), labels))


def convnet() -> tuple[nn.Module, Batch]:
    """Convolutions over images."""
    return ConvNet(), _images()


def tied_llama() -> tuple[nn.Module, Batch]:
    """Head tied to the embedding."""
    return llama(tied=True)


def untied_llama() -> tuple[nn.Module, Batch]:
    """A head of its own."""
    return llama(tied=False)


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "llama-tied": tied_llama,
    "llama": untied_llama,
    "gpt2": gpt2,
    "bert-classifier": bert,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "opt": opt,
    "gpt-neox": neox,
    "t5": t5,
    "vit": vit,
    "mlp": mlp,
    "convnet": convnet,
}
