"""Which pages the site has, and where their links lead in it.

README.md is `overview.html`, pages of docs/ keep their places, and what they link to in the repository is shown under `source/`. Figures
that are not in the repository are made by running their page.
"""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from docs.building.links import links_of, made_images
from docs.building.pages import ROOT, page_paths, read_page
from docs.building.rendering import STYLE, Menu, render_folder, render_page, render_source, style
from docs.building.running import run_page

IMAGES = (".svg", ".png")


def build_pages(out: Path, menu: Menu) -> None:
    """Every page, and what its links lead to, in the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / STYLE).write_text(style())
    pages = [*page_paths(), ROOT / "CHANGELOG.md"]
    for path in pages:
        _write(out, place(path), render_page(path.read_text(), at=place(path), menu=menu, address=partial(leads_to, path)))
        _copy_images(path, out)
    for path in sorted(_linked(pages) - set(pages)):
        _write_source(out, path, menu)


def _linked(pages: list[Path]) -> set[Path]:
    """Files and folders, without images."""
    links = [(path.parent / link.target).resolve() for path in pages for link in links_of(path.read_text()) if link.target]
    return {path for path in links if path.suffix not in IMAGES}


def _write_source(out: Path, path: Path, menu: Menu) -> None:
    """A file, or a folder with its files."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
        _write(out, place(path), render_folder([entry.name for entry in files], name=name, at=place(path), menu=menu))
        for entry in files:
            _write_source(out, entry, menu)
    else:
        _write(out, place(path), render_source(path.read_text(), name=name, at=place(path), menu=menu))


def place(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    inside = path.relative_to(ROOT)
    if inside == Path("README.md"):
        return "overview.html"
    if inside == Path("docs/README.md"):
        return "index.html"
    if inside == Path("CHANGELOG.md"):
        return "changelog.html"
    if inside.parts[0] == "docs" and inside.suffix == ".md":
        return inside.relative_to("docs").with_suffix(".html").as_posix()
    if path.is_dir():
        return f"source/{inside.as_posix()}/index.html"
    return f"source/{inside.as_posix()}.html"


def leads_to(path: Path, written: str) -> str:
    """What a link of the page `path` is in the site."""
    parts = urlsplit(written)
    if parts.scheme or not parts.path:
        return written
    target = (path.parent / unquote(parts.path)).resolve()
    if target.suffix in IMAGES:
        return written
    return urlunsplit(("", "", quote(os.path.relpath(place(target), Path(place(path)).parent)), "", parts.fragment))


def _write(out: Path, at: str, text: str) -> None:
    (out / at).parent.mkdir(parents=True, exist_ok=True)
    (out / at).write_text(text)


def _copy_images(path: Path, out: Path) -> None:
    """Beside the page, as it links to them."""
    made = {name for name, _ in made_images(read_page(path))} if path in page_paths() else set()
    with tempfile.TemporaryDirectory() as directory:
        if made:
            run_page(read_page(path), Path(directory).resolve())
        for link in links_of(path.read_text()):
            if link.image:
                target = (out / place(path)).parent / link.target
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy((Path(directory) if link.target in made else path.parent) / link.target, target)
