"""The HTML of the pages: every link leads to a file and an anchor, and nothing needs the network."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.building.pages import ROOT
from docs.building.rendering import render_page
from docs.building.site import build_pages, leads_to, place


class Reader(HTMLParser):
    """What a page of HTML refers to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.comments = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name == "href" and tag == "a" and value:
                self.links.append(value)
            elif name in ("src", "href") and value:
                self.loaded.append(value)

    def handle_comment(self, data: str) -> None:
        self.comments += 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build_pages(out, [("Documentation", "index.html"), ("Overview", "overview.html")])
    return out


def test_every_link_leads_somewhere(site: Path) -> None:
    read = {path: Reader(path.read_text()) for path in site.rglob("*.html")}
    assert len(read) > 5
    for path, page in read.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme and link not in page.loaded:
                continue
            assert not parts.scheme, f"{path.name} loads {link} from the network"
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment:
                assert parts.fragment in read[target].anchors, f"{path.name}: {link}"


def test_what_is_hidden_in_pages_is_not_in_the_site(site: Path) -> None:
    for path in [site / "overview.html", site / "first-hour.html"]:
        page = path.read_text()
        assert Reader(page).comments == 0
        assert "docs.building.samples" not in page


def test_places() -> None:
    train = ROOT / "docs" / "how-to" / "train.md"
    assert place(train) == "how-to/train.html"
    assert leads_to(train, "../README.md#documentation") == "../index.html#documentation"
    assert leads_to(train, "../../README.md#limits") == "../overview.html#limits"
    assert leads_to(train, "../../examples/sft.py") == "../source/examples/sft.py.html"
    assert leads_to(train, "https://example.org/x.md") == "https://example.org/x.md"
    assert leads_to(train, "../figures/depth.svg") == "../figures/depth.svg"


def test_a_page() -> None:
    text = "# One `two`\n\n<!-- slow -->\n## A & b\n```sh\nls < x\n```\n```text\n<out>\n```\n\n| a |\n|---|\n| [b](c.md) |\n"
    page = render_page(text, at="how-to/x.html", menu=[("Home", "index.html")], address=lambda link: f"to/{link}")
    assert "<title>One two</title>" in page
    assert '<h2 id="a--b">A &amp; b</h2>' in page
    assert '<pre class="output" tabindex=0>&lt;out&gt;\n</pre>' in page
    assert '<div class="wide"><table>' in page
    assert '<a href="to/c.md">b</a>' in page
    assert '<a href="../index.html">Home</a>' in page
    assert '<link rel="stylesheet" href="../style.css">' in page
    assert "slow" not in page
