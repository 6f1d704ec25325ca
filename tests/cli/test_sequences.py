"""`sequences`: what is learned and what is only read; every token is kept; held-out rows and batches."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chunkft_compile.data import Example
from chunkft_compile.sequences import IGNORED, Row, Rows, Sequences, encode, pad, shuffled_batches, split
from docs.building.samples import byte_tokenizer

EOS = 256
TOKENIZER = byte_tokenizer()


def numbered(count: int) -> list[Row]:
    return [Row(torch.tensor([i, i]), torch.tensor([i, i])) for i in range(count)]


def padded(found: Rows, length: int) -> Sequences:
    return pad(found.rows, length, found.filler)


def test_a_stream_is_cut_at_the_end_of_text_token() -> None:
    found = padded(encode([Example("", "ab<eos>c")], TOKENIZER, length=5, stream=True), 5)
    a, b, c = TOKENIZER("abc")["input_ids"]
    assert found.input_ids.tolist() == [[a, b, EOS, c, EOS]]
    assert torch.equal(found.input_ids, found.labels)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), st.integers(2, 8))
def test_a_stream_keeps_every_token_but_the_last_few(documents: list[str], length: int) -> None:
    documents = [document for document in documents if document.strip()]
    stream = [token for document in documents for token in [*TOKENIZER(document)["input_ids"], EOS]]
    examples = [Example("", document) for document in documents]
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens long, one sequence needs {length}: add text or lower --seq"):
            encode(examples, TOKENIZER, length=length, stream=True)
        return
    found = padded(encode(examples, TOKENIZER, length=length, stream=True), length)
    assert found.input_ids.flatten().tolist() == stream[: len(stream) // length * length]


def test_prompts_and_padding_are_not_learned() -> None:
    found = padded(encode([Example("ab", "c")], TOKENIZER, length=6, stream=False), 6)
    a, b, c = TOKENIZER("abc")["input_ids"]
    assert found.input_ids.tolist() == [[a, b, c, EOS, EOS, EOS]]  # no pad token: padded with the end of text
    assert found.labels.tolist() == [[IGNORED, IGNORED, c, EOS, IGNORED, IGNORED]]


def test_examples_without_a_label_are_dropped_and_counted() -> None:
    examples = [Example("a" * 9, "b"), Example("a", "b" * 9), Example("", "b")]
    found = encode(examples, TOKENIZER, length=4, stream=False)
    assert (len(found.rows), found.dropped, found.cut) == (2, 1, 1)
    with pytest.raises(ValueError, match="in none of the 1 examples does an answer fit into 4 tokens: raise --seq"):
        encode(examples[:1], TOKENIZER, length=4, stream=False)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=6), st.integers(2, 16))
def test_every_padded_sequence_has_a_label_after_its_first_token(pairs: list[tuple[str, str]], length: int) -> None:
    try:
        encoded = encode([Example(*pair) for pair in pairs], TOKENIZER, length=length, stream=False)
    except ValueError:
        return
    found = padded(encoded, length)
    assert found.input_ids.shape == found.labels.shape == (len(pairs) - encoded.dropped, length)
    assert bool((found.labels[:, 1:] != IGNORED).any(dim=1).all())
    learned = found.labels != IGNORED
    assert torch.equal(found.labels[learned], found.input_ids[learned])


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode([Example("", "a")], bare, length=2, stream=True)


def test_split_takes_the_end_or_a_random_part() -> None:
    def first(rows: list[Row]) -> list[int]:
        return [int(row.input_ids[0]) for row in rows]

    train, held = split(numbered(10), 0.2, most=9, seed=None)
    assert first(held) == [8, 9]
    assert len(train) == 8
    train, held = split(numbered(10), 0.5, most=3, seed=1)
    assert len(held) == 3
    assert sorted([*first(train), *first(held)]) == list(range(10))
    assert split(numbered(1), 0.0, most=3, seed=None)[1] == []
    with pytest.raises(ValueError, match="none can be held out"):
        split(numbered(1), 0.1, most=3, seed=None)


def test_batches_are_full_and_repeat_in_a_new_order() -> None:
    batches = shuffled_batches(pad(numbered(5), 2, 0), 2, seed=0)
    first, second = ([int(i) for batch in islice(batches, 2) for i in batch["input_ids"][:, 0]] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 4
    assert first != second
    with pytest.raises(ValueError, match="5 sequences are fewer than one batch of 6"):
        shuffled_batches(pad(numbered(5), 2, 0), 6, seed=0)


def test_the_digest_tells_sequences_apart() -> None:
    one, same, other = pad(numbered(5), 2, 0), pad(numbered(5), 2, 0), pad(numbered(5), 3, 0)
    assert one.digest() == same.digest() != other.digest()
    one.labels[4, 1] = IGNORED
    assert one.digest() != same.digest()
