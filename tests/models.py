"""Models small enough to capture in about a second, and batches for them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

transformers.logging.set_verbosity_error()

VOCABULARY = 48
TOKENS = 10

Batch = Mapping[str, torch.Tensor]


def llama(*, tied: bool = False, **changes: Any) -> nn.Module:
    """Two blocks, two query heads to one key and value head."""
    settings: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"intermediate_size": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "tie_word_embeddings": tied}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


def gpt2(*, tied: bool = True, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """Two blocks of LayerNorm, Conv1D and biases."""
    settings: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "tie_word_embeddings": tied,
    }
    settings |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | changes)))


def bert_config(**changes: Any) -> Any:
    """Two blocks, three classes, no dropout."""
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
    }
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertConfig(**(settings | changes))


def bert(**changes: Any) -> nn.Module:
    """An encoder that classifies; its embedding is tied to nothing."""
    return transformers.BertForSequenceClassification(bert_config(**changes))


def bert_masked() -> nn.Module:
    """An encoder whose head shares the embedding."""
    return transformers.BertForMaskedLM(bert_config(tie_word_embeddings=True))


class Mlp(nn.Module):
    """Layers under names of their own: no repeated stack to cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.leave(torch.relu(self.middle(torch.tanh(self.enter(x)))))
        return y


class Normed(nn.Module):
    """LayerNorm with weight and bias, a bare bias and a scalar gain."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8, bias=False)
        self.bias = nn.Parameter(torch.randn(8))
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.leave = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.leave(self.gain * self.norm(self.enter(x) + self.bias))
        return y


class Shared(nn.Module):
    """One Linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.leave(self.twice(torch.tanh(self.twice(torch.tanh(self.enter(x))))))
        return y


class Tagger(nn.Module):
    """Embedding, a hidden layer and a cross entropy of any kind, in one segment; `settings` go to the loss."""

    def __init__(self, *, tied: bool = False, weighted: bool = False, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("weights", torch.linspace(0.5, 1.5, VOCABULARY) if weighted else None)

    def extra_repr(self) -> str:
        return f"{self.settings}, tied={self.head.weight is self.embedding.weight}, weighted={self.weights is not None}"

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.hidden(self.embedding(input_ids)))).flatten(0, -2)
        weights: torch.Tensor | None = self.weights  # type: ignore[assignment]
        return functional.cross_entropy(logits, labels.flatten(), weights, **self.settings)


def gemma2() -> nn.Module:
    """Two blocks under a tied head whose logits are capped by a tanh."""
    settings: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings |= {"intermediate_size": 24, "vocab_size": VOCABULARY, "head_dim": 8, "final_logit_softcapping": 3.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings))


def sequential() -> nn.Module:
    """Activations between layers, as nn.Sequential numbers them."""
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def token_batch(seed: int = 0, *, rows: int = 2, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Token ids that are their own labels."""
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def masked_batch(seed: int = 0, *, rows: int = 2, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Token ids of which most of the first row are no labels."""
    batch = token_batch(seed, rows=rows, tokens=tokens)
    labels = batch["labels"].clone()
    labels[0, : tokens * 4 // 5] = -100
    return batch | {"labels": labels}


def counted_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose loss is a sum over as many tokens as the Trainer counted in all micro-batches."""
    return masked_batch(seed) | {"num_items_in_batch": torch.tensor(17)}


def class_batch(seed: int = 0, *, rows: int = 2, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Token ids with one of three classes per row."""
    ids = token_batch(seed, rows=rows, tokens=tokens)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


def vector_batch(seed: int = 0, *, rows: int = 4) -> dict[str, torch.Tensor]:
    """Inputs and targets of a regression."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 3, generator=generator)}


def compute_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own loss, or the squared error of a plain model, computed outside of it."""
    if "y" in batch:
        return functional.mse_loss(model(batch["x"]), batch["y"])
    loss: torch.Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class Case:
    """A model under a name, and its batches by seed."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]

    def build(self) -> nn.Module:
        """The model in training mode, with the same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().train()

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How a batch is passed to the model."""
        batch = self.batch(seed)
        return ((batch["x"],), {}) if "y" in batch else ((), batch)


TRANSFORMERS = (
    Case("llama", llama, token_batch),
    Case("llama-tied", functools.partial(llama, tied=True), token_batch),
    Case("gpt2", functools.partial(gpt2, tied=False), token_batch),
    Case("gpt2-tied", gpt2, token_batch),
    Case("bert", bert, class_batch),
    Case("bert-tied", bert_masked, token_batch),
)
PLAIN = (
    Case("mlp", Mlp, vector_batch),
    Case("sequential", sequential, vector_batch),
    Case("normed", Normed, vector_batch),
    Case("shared", Shared, vector_batch),
)
CASES = (*TRANSFORMERS, *PLAIN)
