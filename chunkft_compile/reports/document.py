"""Sections of sentences and tables, as plain text for a terminal or as Markdown for an issue."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

# What Markdown or HTML reads as more than a character; names of parameters may hold anything. An underscore inside a word is one, and a
# bracket without a parenthesis behind it makes no link: `self_attn.q_proj.weight[0:64]` stays readable as it is.
_SPECIAL = re.compile(r"[\\`*<>|~$&]|\](?=\()|(?<!\w)_|_(?!\w)|^[#+=-]")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headers. Texts stand left, figures right: `left` are the numbers of the columns of texts."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.headers)]:
            raise ValueError(f"a row needs {len(self.headers)} cells, got {wrong[0]}")


@dataclass(frozen=True, slots=True)
class Section:
    """Under one title: sentences first, then tables."""

    title: str
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def as_text(sections: Iterable[Section]) -> str:
    """For a terminal; ends in a newline."""
    blocks = []
    for section in sections:
        lines = [_plain(line) for line in (section.title, *section.sentences)]
        blocks.append("\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]))
        blocks += [_tabulated(table, "simple", _plain) for table in section.tables if table.rows]
    return "\n\n".join(blocks) + "\n"


def as_markdown(sections: Sequence[Section]) -> str:
    """For an issue or a page: the first title is the heading, the others come below it."""
    blocks = []
    for number, section in enumerate(sections):
        blocks.append(f"{'#' if number == 0 else '##'} {_escaped(section.title)}")
        if section.sentences:
            blocks.append("\n".join(f"- {_escaped(sentence)}" for sentence in section.sentences))
        blocks += [_tabulated(table, "github", _escaped) for table in section.tables if table.rows]
    return "\n\n".join(blocks) + "\n"


def _tabulated(table: Table, style: str, cell: Callable[[str], str]) -> str:
    align = ["left" if column in table.left else "right" for column in range(len(table.headers))]
    rows = [[cell(text) for text in row] for row in table.rows]
    text = tabulate(rows, [cell(header) for header in table.headers], tablefmt=style, colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _plain(text: str) -> str:
    """Without what moves the cursor of a terminal or breaks a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", _plain(text))
