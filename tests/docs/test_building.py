"""The runner of pages notices what is wrong with a page."""

from pathlib import Path

import pytest

from docs.building.links import anchors_of, dead_links, made_images
from docs.building.outputs import difference, shape
from docs.building.pages import Kind, PageError, parse_page, read_page
from docs.building.running import BlockError, run_page

PAGE = Path("docs/page.md")


def run(text: str, directory: Path) -> None:
    run_page(parse_page(text, PAGE), directory)


def test_a_page_runs_in_order_and_in_its_directory(tmp_path: Path) -> None:
    run(
        """
<!-- hidden set-up
count = 2
-->
```python
print(count, "lines")
```
```text
2 lines
```

```toml
# file: made/settings.toml
steps = 3
```

<!-- file: rows.jsonl -->
```json
{"text": "a"}
```

1. In a list:

   ```sh
   wc -l < rows.jsonl
   cat made/settings.toml
   ```
   ```text
   1
   # file: made/settings.toml
   steps = 3
   ```

```python
from pathlib import Path

class Kept:
    pass

def later() -> str:
    return Path("rows.jsonl").read_text()

assert later().startswith("{")
assert Kept.__module__ == __name__ == "page_page"
```
""",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint('one')\n```\n```text\ntwo\n```", r"page\.md:2: this block does not print what the page shows[\s\S]*-two\n\+one"),
        ("```sh\necho one\n```\n```text\none\ntwo\n```", r"page\.md:2: this block does not print"),
        ("```sh\necho one\n```\n```text\n```", r"page\.md:2: this block does not print"),
        ("```python\n\n1 / 0\n```", r"""page\.md:2: this block fails[\s\S]*page\.md", line 3,[\s\S]*ZeroDivisionError"""),
        ("```python\nassert 1 == 2\n```", r"this block fails[\s\S]*AssertionError"),
        ("```python\nraise SystemExit(0)\n```", r"this block fails[\s\S]*SystemExit"),
        ("```python\nif\n```", r"""this block fails[\s\S]*SyntaxError"""),
        ("```sh\necho said >&2\nfalse | cat\n```", r"page\.md:2: this block ends with exit code 1\nsaid"),
        ("```sh\necho $not_set\n```", "this block ends with exit code"),
        ("<!-- hidden set-up\nx\n-->", r"page\.md:2: this block fails[\s\S]*NameError"),
        ("![it](no.svg)", r"page\.md:1: the image no\.svg is neither in the repository nor made"),
    ],
)
def test_a_block_that_does_not_do_what_the_page_shows(text: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(BlockError, match=message):
        run_page(parse_page(text, page), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words\n\n```python\nx = 1\n", r"page\.md:3: the block that begins here has no closing ```"),
        ("- item\n\n  ```sh\n  ls\n\nwords\n\n```\n```", r"page\.md:3: the block that begins here has no closing ```"),
        ("```", "no closing ```"),
        ("<!-- not run: -->\n```sh\nls\n```", "`not run:` needs a reason"),
        ("<!-- not run -->\n```sh\nls\n```", "no rule for '<!-- not run -->'"),
        ("<!-- file: -->\n```json\n{}\n```", "`file:` needs a name"),
        ("<!-- not run: it needs a GPU -->\n\nwords\n\n```sh\nls\n```", "stands before no block"),
        ("<!-- not run: it needs a GPU -->\n<!-- file: a -->\n```sh\nls\n```", "two comments before one block"),
        ("<!-- not run: it needs a GPU -->", "stands before no block"),
        ("<!-- a remark -->", "no rule for '<!-- a remark -->'"),
        ("```bash\nls\n```", "no rule for a block of 'bash': python and sh are run"),
        ("```yaml\na: 1\n```", "no rule for a block of 'yaml': its first line is to be `# file: NAME`"),
        ("```sh\nls\n```\n\nwords\n\n```text\nout\n```", r"page\.md:7: `text` is what a block prints, and must follow it directly"),
        ("```sh\nls\n```\n```text\nout\n```\n```text\nout\n```", "must follow it directly"),
        ("```toml\n# file: a\n```\n```text\nout\n```", "must follow it directly"),
    ],
)
def test_a_page_that_no_rule_covers(text: str, message: str) -> None:
    with pytest.raises(PageError, match=message):
        parse_page(text, PAGE)


def test_what_is_not_run_has_a_reason_and_is_not_run(tmp_path: Path) -> None:
    page = parse_page("<!-- slow -->\n<!-- not run: it needs a GPU -->\n```sh\nexit 1\n```\n```text\nout\n```\n```\nfree\n```", PAGE)
    assert [(block.kind, block.note, block.expected) for block in page.blocks] == [(Kind.NOT_RUN, "it needs a GPU", "out\n")]
    assert page.slow
    run_page(page, tmp_path)


def test_an_image_may_be_made_by_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ntouch made.svg\n```\n\n![it](made.svg)\n")
    assert made_images(read_page(page)) == [("made.svg", 5)]
    assert dead_links(page) == []
    (tmp_path / "run").mkdir()
    run_page(read_page(page), tmp_path / "run")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("peak 899.8 MB in 2.6 s", "peak 1.2 GB in 350 ms"),
        ("54 % of 1,024", "3.2% of 7"),
        ("step 3: loss 1.2e-05.", "step 40: loss 0.25."),
        ("| a |  10 |\n|---|-----|", "| a | 7 |\n|-----|---|"),
        ("one\ntwo\nthree\n", "one\n...\n"),
        ("one\ntwo\n", "one\n...\ntwo"),
        ("wrote /tmp/x/plan.json", "wrote /home/you/plan.json"),
    ],
)
def test_outputs_of_one_shape(printed: str, expected: str) -> None:
    assert difference(printed, expected, Path("/tmp/x")) is None


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("peak 899.8 MB", "peak 899.8 MB held"),
        ("4 steps", "4 stops"),
        ("3 minutes", "3 s"),
        ("loss nan", "loss 0.25"),
        ("one\ntwo", "one"),
        ("one", "one\ntwo"),
        ("one\nthree", "one\n...\ntwo"),
        ("a b", "ab"),
    ],
)
def test_outputs_of_other_shapes(printed: str, expected: str) -> None:
    found = difference(printed, expected, Path("/tmp/x"))
    assert found is not None
    assert found.endswith(f"as printed:\n{printed}")


def test_shape_keeps_words() -> None:
    assert shape("T = 2, 3 minutes, 1.5 h, 7 bytes, block.0") == "T = #, # minutes, #, # bytes, block.#"


def test_dead_links_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# The `idea`, again!\n\n## The `idea`, again!\n\n## Ünder_way\n")
    assert anchors_of(other.read_text()) == ["the-idea-again", "the-idea-again-1", "ünder_way"]
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n[a](other.md#the-idea-again-1) [b](#here) [c](https://example.org/no) [d](.)\n")
    assert dead_links(page) == []
    page.write_text("# Here\n\n[a](gone.md)\n\n[b](other.md#no)\n\n| [c](#there) |\n|---|\n")
    dead = dead_links(page)
    assert [line.removeprefix(f"{page}:") for line in dead] == [
        "3: gone.md does not exist",
        "5: other.md has no heading #no, only the-idea-again, the-idea-again-1, ünder_way",
        "7: this page has no heading #there, only here",
    ]
