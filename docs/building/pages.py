"""Markdown in, blocks out: what of a page is executed, written to a file, or expected to be printed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
WITH_COMMENTS = ("yaml", "toml", "python")  # languages whose first line can be `# file: NAME`

_COMMENT = re.compile(r"<!--\s*(?P<what>slow|not run:|file:|hidden set-up)(?P<rest>.*?)\s*-->", re.DOTALL)


class PageError(ValueError):
    """A page that cannot be read; the message begins with its path and line."""


class Kind(Enum):
    """What becomes of a block."""

    PYTHON = "python"
    SHELL = "sh"
    FILE = "file"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Block:
    """`line` is that of the first line of `source` in the page, counted from 1."""

    kind: Kind
    source: str
    line: int
    expected: str | None = None
    """What it prints, where the page says so."""
    note: str = ""
    """NAME of a file, REASON of what is not run."""


@dataclass(frozen=True)
class Page:
    """The blocks of `path` in their order."""

    path: Path
    text: str
    blocks: tuple[Block, ...]
    slow: bool


def page_paths() -> list[Path]:
    """README.md and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tokens_of(text: str) -> list[Token]:
    """Every token, as all readers of pages see them."""
    return MarkdownIt("commonmark").enable("table").parse(text)


def read_page(path: Path) -> Page:
    """`PageError` where the page holds what no rule covers."""
    return parse_page(path.read_text(), path)


def parse_page(text: str, path: Path) -> Page:
    """As `read_page`, of a text that is to stand in `path`."""
    reader = _Reader(path, text.splitlines())
    for token in tokens_of(text):
        reader.take(token)
    reader.finish()
    return Page(path, text, tuple(reader.blocks), reader.slow)


class _Reader:
    """Takes tokens one by one; a comment waits for the fence it speaks of."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.blocks: list[Block] = []
        self.slow = False
        self._path = path
        self._lines = lines
        self._waiting: tuple[str, str, int] | None = None  # what, rest, line
        self._printing = False  # whether the token before was a block that can print

    def take(self, token: Token) -> None:
        if token.type == "fence":
            self._fence(token)
            return
        if self._waiting and token.type != "html_block":
            self.finish()
        if token.type == "html_block":
            self._comment(token)
        self._printing = False

    def finish(self) -> None:
        if self._waiting:
            what, _, line = self._waiting
            raise self._error(line, f"`<!-- {what} -->` stands before no block")

    def _error(self, line: int, message: str) -> PageError:
        return PageError(f"{self._path}:{line}: {message}")

    def _comment(self, token: Token) -> None:
        line = _first_line(token)
        # a comment ends an html block, so another one on the next line is in a token of its own
        found = _COMMENT.fullmatch(token.content.strip())
        if found is None:
            raise self._error(line, f"no rule for {token.content.strip()[:60]!r}: slow, not run, file and hidden set-up are known")
        what, rest = found["what"], found["rest"]
        if what == "slow":
            self.slow = True
        elif what == "hidden set-up":
            self.blocks.append(Block(Kind.PYTHON, rest.lstrip(" ").removeprefix("\n"), line + 1))
        elif self._waiting:
            raise self._error(line, f"two comments before one block: `{self._waiting[0]}` and `{what}`")
        elif not rest.strip():
            raise self._error(line, f"`{what}` needs {'a reason' if what == 'not run:' else 'a name'} behind the colon")
        else:
            self._waiting = (what, rest.strip(), line)

    def _fence(self, token: Token) -> None:
        line = _first_line(token)
        self._check_end(token, line)
        language, waiting = token.info.strip(), self._waiting
        self._waiting = None
        if language == "text" and waiting is None:
            self._output(token, line)
            return
        block = _block(language, token.content, line + 1, waiting)
        if block is not None:
            self.blocks.append(block)
        elif language:
            raise self._error(line, f"no rule for a block of {language!r}: {_way_out(language)}")
        self._printing = block is not None and block.kind is not Kind.FILE

    def _output(self, token: Token, line: int) -> None:
        if not self._printing:
            raise self._error(line, "`text` is what a block prints, and must follow it directly; a fence without a language is prose")
        self.blocks[-1] = replace(self.blocks[-1], expected=token.content)
        self._printing = False

    def _check_end(self, token: Token, line: int) -> None:
        assert token.map is not None, "fences are lines of the page"
        last = self._lines[token.map[1] - 1].strip("> \t")
        if token.map[1] - 1 == token.map[0] or set(last) != {token.markup[0]} or len(last) < len(token.markup):
            raise self._error(line, f"the block that begins here has no closing {token.markup}")


def _first_line(token: Token) -> int:
    assert token.map is not None, "blocks are lines of the page"
    return token.map[0] + 1


def _block(language: str, source: str, line: int, waiting: tuple[str, str, int] | None) -> Block | None:
    """None where no rule makes it one."""
    if waiting is not None:
        return Block(Kind.NOT_RUN if waiting[0] == "not run:" else Kind.FILE, source, line, note=waiting[1])
    name = re.match(r"# file: (\S+)\n", source)
    if name is not None and language in WITH_COMMENTS:
        return Block(Kind.FILE, source, line, note=name[1])
    if language in (Kind.PYTHON.value, Kind.SHELL.value):
        return Block(Kind(language), source, line)
    return None


def _way_out(language: str) -> str:
    if language in WITH_COMMENTS:
        return "its first line is to be `# file: NAME`"
    return "python and sh are run, text is compared, and `<!-- file: NAME -->` before it makes it a file"
