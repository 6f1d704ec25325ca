"""Figures of the pages: a block of a page makes one with plotly and saves it. Here they get one look, and become the SVG that pages show.

python -m docs.building.figures docs/the-idea.md      runs a page, and draws what it saves into docs/figures, with Debian's chromium
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from chunkft_compile.planner import Category
from docs.building.pages import read_page
from docs.building.running import run_page

COLOURS = {
    Category.WEIGHTS: "#8a7883",
    Category.STATE: "#b4469f",
    Category.GRADIENTS: "#df781e",
    Category.SAVED: "#3d8fe0",
    Category.STAGING: "#b08a2c",
    Category.WORKSPACE: "#3f9a5c",
}
"""As on the page of `chunkft report`, between its light and its dark ones: a figure has one set for both."""

SUFFIX = ".figure.json"
FIGURES = Path(__file__).parents[1] / "figures"
_INK, _GRID = "#7a8696", "rgba(122, 134, 150, 0.3)"  # read on white and on black
_WIDTH, _HEIGHT = 640, 380  # text can still be read where a phone shows it at half its size
_CHROMIUM = "/usr/bin/chromium"


def save(figure: go.Figure, name: str) -> None:
    """Write `name.figure.json` into the working directory, in the look of all figures: transparent, legend below, no title."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": _INK, "size": 14, "family": "sans-serif"},
        margin={"l": 60, "r": 20, "t": 30, "b": 60},
        legend={"orientation": "h", "y": -0.25, "traceorder": "normal"},
        height=_HEIGHT,
    )
    figure.update_xaxes(gridcolor=_GRID, linecolor=_INK, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, linecolor=_INK, zeroline=False, automargin=True)
    Path(name + SUFFIX).write_text(figure.to_json(), encoding="utf-8")


def draw(directory: Path, target: Path = FIGURES) -> list[Path]:
    """Draw every saved figure of `directory` as SVG into `target`; the files written. Raises `ValueError` where there is none."""
    found = sorted(directory.glob("*" + SUFFIX))
    if not found:
        raise ValueError(f"{directory} has no *{SUFFIX}: run the blocks of a page there first")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_content("<div id=figure></div>")
        page.add_script_tag(content=get_plotlyjs())
        for file in found:
            figure = json.loads(file.read_text(encoding="utf-8"))
            written.append(target / f"{file.name.removesuffix(SUFFIX)}.svg")
            written[-1].write_text(_svg(page, figure) + "\n", encoding="utf-8")
        browser.close()
    return written


def _svg(page: Any, figure: dict[str, Any]) -> str:
    """The text of an image; plotly gives its address, which holds it percent-encoded."""
    script = f"""async figure => decodeURIComponent(
        (await Plotly.toImage(figure, {{format: "svg", width: {_WIDTH}, height: {_HEIGHT}}})).replace(/^data:image.svg.xml,/, ""))"""
    text: str = page.evaluate(script, figure)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run a page and draw its figures."""
    parser = argparse.ArgumentParser(description="Run a page, and draw the figures that it saves into docs/figures.")
    parser.add_argument("page", type=Path, metavar="PAGE")
    page = read_page(parser.parse_args(argv).page.resolve())
    with tempfile.TemporaryDirectory() as directory:
        run_page(page, Path(directory).resolve())
        for path in draw(Path(directory)):
            print(path)


if __name__ == "__main__":
    main()
