"""Text and JSONL files in, fixed-length token sequences out.

Two functions, so that a bad file is found before a model is loaded: `read_examples` checks the file and needs no tokenizer,
`encode` turns its examples into sequences that all have one length (a plan is made for one batch shape).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy of Hugging Face models leaves out
FIELDS = "`text`, or `prompt` and `completion`, or `question` and `answer`"


@dataclass(frozen=True)
class Example:
    """What the model reads (`prompt`, not trained on) and what it learns to write (`completion`)."""

    prompt: str
    completion: str


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of one length. `dropped` examples gave no label, `cut` lost their end, because they were too long."""

    input_ids: torch.Tensor  # [N, S]
    labels: torch.Tensor  # [N, S], IGNORED where nothing is to be learned
    dropped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def take(self, index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        """The batch a causal language model is called with: `model(**sequences.take(...)).loss`."""
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def part(self, index: torch.Tensor | slice) -> "Sequences":
        """Some of the sequences."""
        return replace(self, input_ids=self.input_ids[index], labels=self.labels[index])


def read_examples(path: Path) -> list[Example]:
    """The examples of a `.txt` file (one, all of it) or a `.jsonl` file (one a line). Raises `ValueError` naming the line."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"data file {path} ends in {path.suffix!r}: use .txt (plain text) or .jsonl (one JSON object a line, with {FIELDS})"
        )
    if not path.is_file():
        raise ValueError(f"data file {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"data file {path} line {line}: not UTF-8 (byte {error.object[error.start]:#04x}); convert it first") from error
    if not text.strip():
        raise ValueError(f"data file {path} is empty: it needs text to train on")
    if path.suffix == ".txt":
        return [Example("", text)]
    # not splitlines(): JSON strings may hold the rarer line separators of Unicode
    return [_parse(line, f"data file {path} line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is a {type(row).__name__}, not an object with {FIELDS}")
    if "text" in row:
        return Example("", _string(row, "text", where))
    if "prompt" in row and "completion" in row:
        return Example(_string(row, "prompt", where), _string(row, "completion", where))
    if "question" in row and "answer" in row:
        return Example(_string(row, "question", where) + "\n", _string(row, "answer", where))
    raise ValueError(f"{where}: needs {FIELDS}; it has {', '.join(f'`{name}`' for name in row) or 'no field'}")


def _string(row: dict[str, object], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: `{field}` is {json.dumps(value)}, not a string")
    if not value.strip() and field != "prompt":
        raise ValueError(f"{where}: `{field}` is empty")
    return value


def encode(examples: list[Example], tokenizer: "PreTrainedTokenizerBase", *, length: int, packed: bool) -> Sequences:
    """Sequences of `length` tokens. `packed` cuts one stream of all documents; otherwise each example is padded to `length`."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), so documents cannot be told apart; set it and save the tokenizer"
        )
    return _pack(examples, tokenizer, length) if packed else _pad(examples, tokenizer, length)


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, start: bool) -> list[int]:
    # special tokens only at the start of a document: a Llama tokenizer puts its begin-of-text there
    ids: list[int] = tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"]
    return ids[:-1] if start and ids and ids[-1] == tokenizer.eos_token_id else ids


def _pack(examples: list[Example], tokenizer: "PreTrainedTokenizerBase", length: int) -> Sequences:
    stream: list[int] = []
    for example in examples:
        # a file may separate its documents by the end-of-text token, written out
        for document in example.completion.split(str(tokenizer.eos_token)):
            if document.strip():
                stream += [*_tokens(tokenizer, document, start=True), int(tokenizer.eos_token_id)]
    count = len(stream) // length
    if not count:
        raise ValueError(f"the data is {len(stream)} tokens long, one sequence needs {length}: add text or lower --seq")
    ids = torch.tensor(stream[: count * length]).view(count, length)
    return Sequences(ids, ids)


def _pad(examples: list[Example], tokenizer: "PreTrainedTokenizerBase", length: int) -> Sequences:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(examples), length), int(pad))
    labels = torch.full((len(examples), length), IGNORED)
    kept = cut = 0
    for example in examples:
        prompt = _tokens(tokenizer, example.prompt, start=True) if example.prompt else []
        answer = [*_tokens(tokenizer, example.completion, start=not prompt), int(tokenizer.eos_token_id)]
        row = (prompt + answer)[:length]
        # the first token is never predicted, so an example needs a label after it, or its loss is 0 / 0
        if len(row) <= max(len(prompt), 1):
            continue
        cut += len(prompt) + len(answer) > length
        ids[kept, : len(row)] = torch.tensor(row)
        labels[kept, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
        kept += 1
    if not kept:
        raise ValueError(f"in none of the {len(examples)} examples does an answer fit into {length} tokens: raise --seq")
    # padding stands to the right, where a causal model cannot see it from any labelled token: no attention mask is needed
    return Sequences(ids[:kept].clone(), labels[:kept].clone(), dropped=len(examples) - kept, cut=cut)


def split(sequences: Sequences, fraction: float, *, most: int, seed: int | None) -> tuple[Sequences, Sequences | None]:
    """Training and held-out sequences: `fraction` of them, at least 1 and at most `most`; None if `fraction` is 0.

    Held out is the end of the file, so that no training text overlaps it; with a `seed`, a random choice.
    """
    if fraction == 0:
        return sequences, None
    if len(sequences) < 2:
        raise ValueError("the data is one sequence, so none can be held out: add data, lower --seq or pass --eval-fraction 0")
    held = min(max(1, int(len(sequences) * fraction)), most, len(sequences) - 1)
    order = torch.arange(len(sequences))
    if seed is not None:
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences.part(order[:-held]), sequences.part(order[-held:])


def shuffled_batches(sequences: Sequences, size: int, *, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of exactly `size` sequences without end, in a new order every epoch; the rest of an epoch is left out."""
    if len(sequences) < size:
        raise ValueError(f"{len(sequences)} sequences are fewer than one batch of {size}: add data, or lower --batch or --seq")
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            order = torch.randperm(len(sequences), generator=generator)
            for start in range(0, len(sequences) - size + 1, size):
                yield sequences.take(order[start : start + size])

    return batches()
