"""Where the links of a page lead, and which lead nowhere. Addresses on the web are not looked at."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it.token import Token

from docs.building.pages import Page, tokens_of


@dataclass(frozen=True)
class Link:
    """`target` as written, without its anchor; empty for one in the same page."""

    target: str
    anchor: str
    line: int
    image: bool


def links_of(text: str) -> list[Link]:
    """All that lead to files or anchors, in order."""
    found = []
    for token, line in _inline(tokens_of(text)):
        image = token.type == "image"
        if image or token.type == "link_open":
            parts = urlsplit(str(token.attrs["src" if image else "href"]))
            if not parts.scheme:
                found.append(Link(unquote(parts.path), unquote(parts.fragment), line, image))
    return found


def anchors_of(text: str) -> list[str]:
    """Of its headings in order, as GitHub makes them."""
    tokens = tokens_of(text)
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    seen: Counter[str] = Counter()
    anchors = []
    for title in titles:
        anchor = re.sub(r"[^\w\- ]", "", words_of(title).lower()).replace(" ", "-")
        anchors.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def dead_links(path: Path) -> list[str]:
    """One line for each link of the page that leads nowhere. Images may be made by the page: `made_images`."""
    dead = []
    for link in links_of(path.read_text()):
        target = path.parent / link.target if link.target else path
        if not target.exists():
            if not link.image:
                dead.append(f"{path}:{link.line}: {link.target} does not exist")
        elif link.anchor and link.anchor not in (anchors := anchors_of(target.read_text())):
            dead.append(f"{path}:{link.line}: {link.target or 'this page'} has no heading #{link.anchor}, only {', '.join(anchors)}")
    return dead


def made_images(page: Page) -> list[tuple[str, int]]:
    """Images that are not in the repository, with their lines: running the page makes them."""
    images = [link for link in links_of(page.text) if link.image]
    return [(image.target, image.line) for image in images if not (page.path.parent / image.target).exists()]


def _inline(tokens: list[Token]) -> Iterator[tuple[Token, int]]:
    for token in tokens:
        for child in token.children or []:
            yield child, token.map[0] + 1 if token.map else 0


def words_of(title: Token) -> str:
    """A heading without its marks."""
    return "".join(child.content for child in title.children or [] if child.type in ("text", "code_inline"))
