"""`data`: the forms of examples; every refusal names the file and the line."""

import json
from pathlib import Path

import pytest

from chunkft_compile.data import Chat, Example, read_examples

CHAT = [{"role": "user", "content": "", "name": None}, {"role": "assistant", "content": "a"}]


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_is_one_example(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, "a.txt", "\ufeffone\ntwo\n")) == [Example("", "one\ntwo\n")]


def test_jsonl_takes_all_forms(tmp_path: Path) -> None:
    rows = [{"text": "t"}, {"prompt": "", "completion": "c"}, {"question": "q", "answer": "a", "id": 7}, {"messages": CHAT}]
    path = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    *pairs, chat = read_examples(path)
    assert pairs == [Example("", "t"), Example("", "c"), Example("q\n", "a")]
    assert chat == Chat(({"role": "user", "content": ""}, {"role": "assistant", "content": "a"}), f"data file {path} line 7")


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
        ("a.jsonl", b'["text"]', r"a\.jsonl line 1: is a list, not an object with `messages`"),
        ("a.jsonl", b'{"prompt": "p", "answer": "a"}', r"line 1: needs `messages`, or `text`, or .*; it has `prompt`, `answer`"),
        ("a.jsonl", b"{}", r"line 1: needs `messages`, or .*; it has no field"),
        ("a.jsonl", b'{"text": 5}', r"line 1: `text` is 5, not a string"),
        ("a.jsonl", b'{"question": "q", "answer": " "}', r"line 1: `answer` is empty"),
        ("a.jsonl", b'{"messages": []}', r"line 1: `messages` is \[\], not a list of objects with `role`"),
        ("a.jsonl", b'{"messages": "hi"}', r'line 1: `messages` is "hi", not a list'),
        ("a.jsonl", b'{"messages": ["hi"]}', r'line 1, message 1: is "hi", not an object with `role` and `content`'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"line 1, message 1: is .*, not an object with `role` and `content`"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "q"}]}', r"no message is of the role `assistant`.*; it has user"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": ""}]}', r"message 1: `content` is empty"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": []}]}', r"message 1: `content` is \[\], not a string"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}', r"message 1: has `tool_calls`, which"),
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
