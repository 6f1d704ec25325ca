"""Sections as text and as Markdown: nothing that a plan holds can break the table around it."""

import pytest

from chunkft_compile.reports.document import Section, Table, as_markdown, as_text

NASTY = "a|b`c`*d*<b>\n\x1b[2J_e_ self_attn.q[0:8]"
SECTIONS = [Section("Peak", ("One sentence.",), (Table(("what", "bytes"), ((NASTY, "12"), ("total", "1200"))),)), Section("Rest_")]


def test_text_for_a_terminal() -> None:
    assert as_text(SECTIONS).splitlines() == [
        *("Peak", "----", "One sentence.", ""),
        "what                                     bytes",
        "-------------------------------------  -------",
        "a|b`c`*d*<b>??[2J_e_ self_attn.q[0:8]       12",
        "total                                     1200",
        *("", "Rest_", "-----"),
    ]


def test_markdown_keeps_every_row_in_its_cells() -> None:
    text = as_markdown(SECTIONS)
    assert text.startswith("# Peak\n\n- One sentence.\n\n| what ")
    assert text.endswith("\n\n## Rest\\_\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    assert "a\\|b\\`c\\`\\*d\\*\\<b\\>??[2J_e\\_ self_attn.q[0:8]" in text


def test_a_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a row needs 2 cells, got \('one',\)"):
        Table(("a", "b"), (("one",),))
