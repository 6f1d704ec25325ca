"""Every block of every page does what the page shows, and every link leads somewhere."""

import subprocess
from pathlib import Path

import pytest

from docs.building.links import dead_links
from docs.building.pages import ROOT, Kind, PageError, page_paths, read_page


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def with_blocks() -> list[object]:
    """Pages to run. One that cannot be read is among them, and fails as a test and not as a collection."""
    found: list[object] = []
    for path in page_paths():
        try:
            page = read_page(path)
        except PageError:
            found.append(pytest.param(path, id=named(path)))
            continue
        if page.blocks:
            found.append(pytest.param(path, id=named(path), marks=[pytest.mark.slow] if page.slow else []))
    return found


@pytest.mark.timeout(900)  # on a machine with other jobs; each block has its own limit
@pytest.mark.parametrize("path", with_blocks())
def test_blocks(path: Path, commands: Path) -> None:
    """In a process of its own, as a reader's session is: nothing that a page does reaches other tests."""
    done = subprocess.run([commands / "run-page", path, "--commands", commands], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}: every block does what the page shows\n"


@pytest.mark.parametrize("path", page_paths(), ids=named)
def test_links(path: Path) -> None:
    assert dead_links(path) == []


def test_what_is_not_run() -> None:
    """The list of what nobody but a reader runs: each with its reason."""
    reasons = {named(path): [block.note for block in read_page(path).blocks if block.kind is Kind.NOT_RUN] for path in page_paths()}
    for page, notes in reasons.items():
        for note in notes:
            print(f"{page}: {note}")
            assert len(note.split()) > 2, f"{page}: {note!r} is no reason"
