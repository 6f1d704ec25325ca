"""The reference is made from the code: nothing is missing in it, and its page of options is that of today's parsers."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import chunkft_compile
from chunkft_compile.cli import main
from docs.building.reference import CLI_PAGE, MODULES, build, cli_page


def _undocumented(name: str, thing: object) -> Iterator[str]:
    """Public names without a docstring of their own: `thing`, and what a class defines itself."""
    if not (inspect.getdoc(thing) or "").strip():
        yield name
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        code = value.fget if isinstance(value, property) else value
        if not member.startswith("_") and inspect.isfunction(code) and not code.__doc__:
            yield f"{name}.{member}"


@pytest.mark.parametrize("module", ["chunkft_compile", "chunkft_compile.planner"])
def test_every_public_name_has_a_docstring(module: str) -> None:
    found = import_module(module)
    missing = [one for name in found.__all__ if name != "Prefer" for one in _undocumented(name, getattr(found, name))]  # a type alias
    assert not missing


def test_an_undocumented_method_is_noticed() -> None:
    class Told:
        """It is."""

        def silent(self) -> None: ...

    assert list(_undocumented("Told", Told)) == ["Told.silent"]


@pytest.mark.parametrize("name", ["compile", "load", "save_checkpoint", "load_checkpoint", "record", "examine", "last_programs"])
def test_what_can_fail_says_how(name: str) -> None:
    """Every function of the package that users call, except one that never raises."""
    assert "Raises" in (inspect.getdoc(getattr(chunkft_compile, name)) or "")


def test_the_page_of_options_is_up_to_date() -> None:
    assert CLI_PAGE.read_text() == cli_page(), "python -m docs.building.reference"


@pytest.mark.parametrize("command", ["plan", "train", "fit", "pareto", "report", "explain", "diff", "doctor"])
def test_every_option_is_on_the_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Held against what `--help` prints, which is another way through the parsers."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"^  (?:-\w, |-\w \w+, )?(--[a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE)) - {"--help"}
    assert "--debug" in flags
    section = CLI_PAGE.read_text().partition(f"## chunkft {command}\n")[2].partition("\n## ")[0]
    assert not {flag for flag in flags if f"`{flag}" not in section and f" {flag}`" not in section}


def test_the_python_reference_has_all_public_names(tmp_path: Path) -> None:
    pages = build(tmp_path)
    assert [page.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".") for page in pages] == list(MODULES)
    for module, page in zip(MODULES, pages, strict=True):
        text = page.read_text()
        for name in getattr(import_module(module), "__all__", ()):
            assert f'id="{name}"' in text, f"{module}.{name}"
        assert not re.search(r"""(?:src|href)=["']https?://(?!pdoc\.dev)""", text), "needs the network"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunkft_compile", "chunkft_compile.html", "index.html", "search.js"]
