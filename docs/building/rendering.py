"""A page of Markdown, or a source file that a page links to, as one page of HTML without network."""

import html
import os
from collections.abc import Callable
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.util import ClassNotFound

from docs.building.links import anchors_of, words_of

ASSETS = Path(__file__).parent / "assets"
STYLE = "style.css"
SHORT = 24  # characters

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="{up}{style}">
</head>
<body>
<header><nav>{menu}</nav></header>
<main>
{body}</main>
</body>
</html>
"""

_LANGUAGES = {"sh": "x.sh", "python": "x.py", "yaml": "x.yaml", "toml": "x.toml", "json": "x.json"}

Menu = list[tuple[str, str]]
"""Names and addresses from the top of the site."""


def style() -> str:
    """Of all pages, with the colours of code in the light and in the dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".code") for name in ("friendly", "github-dark"))  # type: ignore[no-untyped-call]
    written = (ASSETS / STYLE).read_text()
    return f"{written}\n{_colours(light)}\n@media (prefers-color-scheme: dark) {{\n{_colours(dark)}\n}}\n"


def render_page(text: str, *, at: str, menu: Menu, address: Callable[[str], str]) -> str:
    """HTML to stand at `at`, a path from the top of the site. `address` says where a link of the page leads to there."""
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = [token for token in markdown.parse(text) if not (token.type == "html_block" and token.content.startswith("<!--"))]
    anchors = iter(anchors_of(text))
    headings: list[tuple[str, str]] = []  # of the second level: anchor, words
    title = ""
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and following is not None:
            anchor = next(anchors)
            token.attrSet("id", anchor)
            title = title or words_of(following)
            if token.tag == "h2":
                headings.append((anchor, words_of(following)))
        elif token.type == "fence":
            token.type, token.content = "html_block", _fence(token)
        for child in token.children or []:
            _finish(child, address)
    body = markdown.renderer.render(tokens, markdown.options, {})
    title_end = body.find("</h1>\n") + len("</h1>\n")
    if len(headings) > 3:
        body = body[:title_end] + _contents(headings) + body[title_end:]
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return _whole(title, body, at, menu)


def render_source(text: str, *, name: str, at: str, menu: Menu) -> str:
    """A file of the repository."""
    body = f"<h1><code>{html.escape(name)}</code></h1>\n{_highlighted(text, name)}"
    return _whole(name, body, at, menu)


def render_folder(names: list[str], *, name: str, at: str, menu: Menu) -> str:
    """The files of a folder, which stand beside `at` as `NAME.html`."""
    items = "".join(f'<li><a href="{html.escape(entry)}.html">{html.escape(entry)}</a></li>\n' for entry in names)
    return _whole(name, f"<h1><code>{html.escape(name)}</code></h1>\n<ul>\n{items}</ul>\n", at, menu)


def _whole(title: str, body: str, at: str, menu: Menu) -> str:
    up = os.path.relpath(".", Path(at).parent) + "/"
    links = " ".join(
        f'<a href="{up}{target}"{" aria-current=page" if target == at else ""}>{html.escape(name)}</a>' for name, target in menu
    )
    return _PAGE.format(title=html.escape(title), up=up, style=STYLE, menu=links, body=body)


def _contents(headings: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="#{anchor}">{html.escape(words)}</a></li>' for anchor, words in headings)
    return f"<details class=contents><summary>On this page</summary><ul>{items}</ul></details>\n"


def _finish(token: Token, address: Callable[[str], str]) -> None:
    if token.type == "link_open":
        token.attrSet("href", address(str(token.attrs["href"])))
    elif token.type == "image":
        token.attrSet("src", address(str(token.attrs["src"])))
    elif token.type == "code_inline" and len(token.content) <= SHORT:
        token.attrSet("class", "short")  # `--option` is not broken behind its hyphens


def _fence(token: Token) -> str:
    language = token.info.strip()
    if language in _LANGUAGES:
        return _highlighted(token.content, _LANGUAGES[language], f"code {language}")
    kind = "output" if language == "text" else "drawing"
    return f'<pre class="{kind}" tabindex=0>{html.escape(token.content)}</pre>\n'


def _highlighted(text: str, name: str, classes: str = "code") -> str:
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = TextLexer()
    return str(highlight(text, lexer, HtmlFormatter(cssclass=classes)))


def _colours(rules: str) -> str:
    """Of the text only: the page has its own paper, and lines are not numbered."""
    kept = [line for line in rules.splitlines() if line.startswith(".code .")]
    return "\n".join(kept)
