"""`data`: every refusal names the file and the line; what is learned and what is only read."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chunkft_compile.data import IGNORED, Example, Sequences, encode, read_examples, shuffled_batches, split
from tests.cli.conftest import make_tokenizer

EOS = 256
TOKENIZER = make_tokenizer()


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def numbered(count: int) -> Sequences:
    ids = torch.arange(count).view(-1, 1).expand(-1, 2)
    return Sequences(ids, ids)


def test_text_is_one_example(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, "a.txt", "\ufeffone\ntwo\n")) == [Example("", "one\ntwo\n")]


def test_jsonl_takes_all_three_forms(tmp_path: Path) -> None:
    rows = [{"text": "t"}, {"prompt": "", "completion": "c"}, {"question": "q", "answer": "a", "id": 7}]
    path = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_examples(path) == [Example("", "t"), Example("", "c"), Example("q\n", "a")]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\n')) == [Example("", "a\u2028b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv ends in '\.csv': use \.txt .* or \.jsonl"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\t\n", r"a\.txt is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
        ("a.txt", b"one\ntwo\xff\n", r"a\.txt line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl line 3: not JSON \(Expecting value at column 10\)"),
        ("a.jsonl", b'["text"]', r"a\.jsonl line 1: is a list, not an object with `text`"),
        ("a.jsonl", b'{"prompt": "p", "answer": "a"}', r"line 1: needs `text`, or .*; it has `prompt`, `answer`"),
        ("a.jsonl", b"{}", r"line 1: needs `text`, or .*; it has no field"),
        ("a.jsonl", b'{"text": 5}', r"line 1: `text` is 5, not a string"),
        ("a.jsonl", b'{"question": "q", "answer": " "}', r"line 1: `answer` is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ValueError, match=r"d\.txt is not a file"):
        read_examples(tmp_path / "d.txt")
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        read_examples(tmp_path / "none.txt")


def test_packing_splits_at_the_end_of_text_token() -> None:
    packed = encode([Example("", "ab<eos>c")], TOKENIZER, length=5, packed=True)
    a, b, c = TOKENIZER("abc")["input_ids"]
    assert packed.input_ids.tolist() == [[a, b, EOS, c, EOS]]
    assert torch.equal(packed.input_ids, packed.labels)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), st.integers(2, 8))
def test_packing_keeps_every_token_but_the_last_few(documents: list[str], length: int) -> None:
    documents = [document for document in documents if document.strip()]
    stream = [token for document in documents for token in [*TOKENIZER(document)["input_ids"], EOS]]
    examples = [Example("", document) for document in documents]
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens long, one sequence needs {length}: add text or lower --seq"):
            encode(examples, TOKENIZER, length=length, packed=True)
        return
    packed = encode(examples, TOKENIZER, length=length, packed=True)
    assert packed.input_ids.flatten().tolist() == stream[: len(stream) // length * length]


def test_prompts_and_padding_are_not_learned() -> None:
    padded = encode([Example("ab", "c")], TOKENIZER, length=6, packed=False)
    a, b, c = TOKENIZER("abc")["input_ids"]
    assert padded.input_ids.tolist() == [[a, b, c, EOS, EOS, EOS]]  # no pad token: padded with the end of text
    assert padded.labels.tolist() == [[IGNORED, IGNORED, c, EOS, IGNORED, IGNORED]]


def test_examples_without_a_label_are_dropped_and_counted() -> None:
    examples = [Example("a" * 9, "b"), Example("a", "b" * 9), Example("", "b")]
    padded = encode(examples, TOKENIZER, length=4, packed=False)
    assert (len(padded), padded.dropped, padded.cut) == (2, 1, 1)
    with pytest.raises(ValueError, match="in none of the 1 examples does an answer fit into 4 tokens: raise --seq"):
        encode(examples[:1], TOKENIZER, length=4, packed=False)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=6), st.integers(2, 16))
def test_every_padded_sequence_has_a_label_after_its_first_token(pairs: list[tuple[str, str]], length: int) -> None:
    try:
        padded = encode([Example(*pair) for pair in pairs], TOKENIZER, length=length, packed=False)
    except ValueError:
        return
    assert padded.input_ids.shape == padded.labels.shape == (len(pairs) - padded.dropped, length)
    assert bool((padded.labels[:, 1:] != IGNORED).any(dim=1).all())
    learned = padded.labels != IGNORED
    assert torch.equal(padded.labels[learned], padded.input_ids[learned])


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode([Example("", "a")], bare, length=2, packed=True)


def test_split_takes_the_end_or_a_random_part() -> None:
    train, held = split(numbered(10), 0.2, most=9, seed=None)
    assert held is not None
    assert held.input_ids[:, 0].tolist() == [8, 9]
    assert len(train) == 8
    train, held = split(numbered(10), 0.5, most=3, seed=1)
    assert held is not None
    assert len(held) == 3
    assert sorted([*train.input_ids[:, 0].tolist(), *held.input_ids[:, 0].tolist()]) == list(range(10))
    assert split(numbered(1), 0.0, most=3, seed=None)[1] is None
    with pytest.raises(ValueError, match="none can be held out"):
        split(numbered(1), 0.1, most=3, seed=None)


def test_batches_are_full_and_repeat_in_a_new_order() -> None:
    batches = shuffled_batches(numbered(5), 2, seed=0)
    first, second = ([int(i) for batch in islice(batches, 2) for i in batch["input_ids"][:, 0]] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 4
    assert first != second
    with pytest.raises(ValueError, match="5 sequences are fewer than one batch of 6"):
        shuffled_batches(numbered(5), 6, seed=0)
