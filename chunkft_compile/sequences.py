"""Examples in, token sequences of one length out: a plan is made for one shape of batches.

`encode` makes a row of tokens and labels of each example, `split` holds some back, and `pad` gives each row a sequence of its own;
`packing.pack` puts several into one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chunkft_compile.chat import ChatFormat
from chunkft_compile.data import Chat, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy of Hugging Face models leaves out


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of one example and what is to be learned of them; never more than the length of a sequence."""

    input_ids: torch.Tensor  # [n]
    labels: torch.Tensor  # [n], IGNORED where nothing is to be learned

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, eq=False)
class Rows:
    """All examples that can be learned. `dropped` others gave no label, `cut` lost their end, because they were too long.

    `filler` is the token that stands where there is no example.
    """

    rows: list[Row]
    filler: int
    dropped: int = 0
    cut: int = 0


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of one length. `position_ids` say where each example of a packed sequence begins; they are None elsewhere."""

    input_ids: torch.Tensor  # [N, S]
    labels: torch.Tensor  # [N, S]
    position_ids: torch.Tensor | None = None  # [N, S]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs of the model."""
        named = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def take(self, index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        """The batch a causal language model is called with: `model(**sequences.take(...)).loss`."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """The same for the same sequences."""
        found = hashlib.sha256()
        for tensor in self.tensors.values():
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:12]


def encode(examples: Sequence[Example | Chat], tokenizer: "PreTrainedTokenizerBase", *, length: int, stream: bool) -> Rows:
    """Rows of at most `length` tokens: one for each example, or with `stream` all documents on end, cut into rows of `length`.

    Raises `ValueError` for a tokenizer that lacks what is needed, for a conversation that its template does not take, and where nothing
    is left to learn.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), so documents cannot be told apart; set it and save the tokenizer"
        )
    filler = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    if stream:
        return Rows(_stream(examples, tokenizer, length), filler)
    rows, dropped, cut = [], 0, 0
    chats = ChatFormat(tokenizer) if any(isinstance(example, Chat) for example in examples) else None
    for example in examples:
        ids, learned = chats.encode(example) if chats is not None and isinstance(example, Chat) else _encode(example, tokenizer)
        # the first token is never predicted, so an example needs a label after it, or its loss is 0 / 0
        if not any(learned[1:length]):
            dropped += 1
            continue
        cut += len(ids) > length
        kept = torch.tensor(ids[:length])
        rows.append(Row(kept, kept.masked_fill(~torch.tensor(learned[:length]), IGNORED)))
    if not rows:
        raise ValueError(f"in none of the {len(examples)} examples does an answer fit into {length} tokens: raise --seq")
    return Rows(rows, filler, dropped, cut)


def _encode(example: Example | Chat, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    assert isinstance(example, Example), "conversations have a format of their own"
    prompt = _tokens(tokenizer, example.prompt, start=True) if example.prompt else []
    answer = [*_tokens(tokenizer, example.completion, start=not prompt), int(tokenizer.eos_token_id)]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, start: bool) -> list[int]:
    # special tokens only at the start of a document: a Llama tokenizer puts its begin-of-text there
    ids: list[int] = tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"]
    return ids[:-1] if start and ids and ids[-1] == tokenizer.eos_token_id else ids


def _stream(examples: Sequence[Example | Chat], tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Row]:
    stream: list[int] = []
    for example in examples:
        assert isinstance(example, Example), "a text file has no conversations"
        # a file may separate its documents by the end-of-text token, written out
        for document in example.completion.split(str(tokenizer.eos_token)):
            if document.strip():
                stream += [*_tokens(tokenizer, document, start=True), int(tokenizer.eos_token_id)]
    count = len(stream) // length
    if not count:
        raise ValueError(f"the data is {len(stream)} tokens long, one sequence needs {length}: add text or lower --seq")
    ids = torch.tensor(stream[: count * length]).view(count, length)
    return [Row(row, row) for row in ids]


def split(rows: list[Row], fraction: float, *, most: int, seed: int | None) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: `fraction` of them, at least 1 and at most `most`; none if `fraction` is 0.

    Held out is the end of the file, so that no training text overlaps it; with a `seed`, a random choice.
    """
    if fraction == 0:
        return rows, []
    if len(rows) < 2:
        raise ValueError("the data is one sequence, so none can be held out: add data, lower --seq or pass --eval-fraction 0")
    held = min(max(1, int(len(rows) * fraction)), most, len(rows) - 1)
    order = list(range(len(rows)))
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:-held]], [rows[i] for i in order[-held:]]


def pad(rows: Sequence[Row], length: int, filler: int) -> Sequences:
    """A sequence for each row."""
    ids = torch.full((len(rows), length), filler)
    labels = torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row)], labels[number, : len(row)] = row.input_ids, row.labels
    # padding stands to the right, where a causal model cannot see it from any labelled token: no attention mask is needed
    return Sequences(ids, labels)


def shuffled_batches(sequences: Sequences, size: int, *, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of exactly `size` sequences without end, in a new order every epoch; the rest of an epoch is left out."""
    if len(sequences) < size:
        raise ValueError(f"{len(sequences)} sequences are fewer than one batch of {size}: add data, or lower --batch or --seq")
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            order = torch.randperm(len(sequences), generator=generator).tolist()  # no tensor stays between steps: a budget counts them
            for start in range(0, len(sequences) - size + 1, size):
                yield sequences.take(torch.tensor(order[start : start + size]))

    return batches()
