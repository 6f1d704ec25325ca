"""Text and JSONL files in, examples out. A bad file is found here, before a tokenizer or a model is loaded; `sequences` goes on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = "`messages`, or `text`, or `prompt` and `completion`, or `question` and `answer`"


@dataclass(frozen=True)
class Example:
    """What the model reads (`prompt`, not trained on) and what it learns to write (`completion`)."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the model learns to write the assistant's turns. `where` is its place in the file, for errors."""

    messages: tuple[dict[str, str], ...]  # each has "role" and "content"
    where: str


def read_examples(path: Path) -> list[Example | Chat]:
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


def _parse(line: str, where: str) -> Example | Chat:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is a {type(row).__name__}, not an object with {FIELDS}")
    if "messages" in row:
        return Chat(_messages(row["messages"], where), where)
    if "text" in row:
        return Example("", _string(row, "text", where))
    if "prompt" in row and "completion" in row:
        return Example(_string(row, "prompt", where), _string(row, "completion", where))
    if "question" in row and "answer" in row:
        return Example(_string(row, "question", where) + "\n", _string(row, "answer", where))
    raise ValueError(f"{where}: needs {FIELDS}; it has {', '.join(f'`{name}`' for name in row) or 'no field'}")


def _messages(found: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: `messages` is {json.dumps(found)[:60]}, not a list of objects with `role` and `content`")
    messages = tuple(_message(one, f"{where}, message {number}") for number, one in enumerate(found, 1))
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise ValueError(f"{where}: no message is of the role `assistant`, so there is nothing to learn; it has {roles}")
    return messages


def _message(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not {"role", "content"} <= found.keys():
        raise ValueError(f"{where}: is {json.dumps(found)[:60]}, not an object with `role` and `content`")
    if strange := [name for name, value in found.items() if name not in ("role", "content") and value is not None]:
        raise ValueError(f"{where}: has `{strange[0]}`, which is not trained on here: leave it out, or write it into `content`")
    role = _string(found, "role", where)
    if role != "assistant" and found["content"] == "":
        return {"role": role, "content": ""}
    return {"role": role, "content": _string(found, "content", where)}


def _string(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: `{field}` is {json.dumps(value)}, not a string")
    if not value.strip() and field != "prompt":
        raise ValueError(f"{where}: `{field}` is empty")
    return value
