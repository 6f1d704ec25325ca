"""The reference: what docstrings say, as HTML by pdoc, and every option of the command line, as a page of docs/.

    python -m docs.building.reference                 writes docs/reference/cli.md anew
    python -m docs.building.reference DIRECTORY       writes the HTML of the Python reference there

Nothing in it is written by hand: options come from the parsers that parse them.
"""

import argparse
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import chunkft_compile.cli

MODULES = (
    "chunkft_compile",
    "chunkft_compile.integrations.transformers",
    "chunkft_compile.integrations.trl",
    "chunkft_compile.dynamo",
    "chunkft_compile.reports.runs",
    "chunkft_compile.planner",
)
"""The doors of users: the package first, then what README.md imports from elsewhere, then the planner."""

CLI_PAGE = Path(__file__).parents[1] / "reference" / "cli.md"

# pdoc has a light theme only; its variables are those of its theme.css (16.0)
_DARK = """
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root, .pdoc {
    --pdoc-background: #14181f; --text: #e8ecf2; --muted: #a7b1c0; --link: #6db7f2; --link-hover: #9fd0f8;
    --code: #1d232c; --active: #37404d;
    --accent: #1d232c; --accent2: #37404d; --nav-hover: #1d232c; --name: #6db7f2; --def: #7cc4a4; --annotation: #9fd0f8;
  }
  .pdoc-code .n, .pdoc-code .p, .pdoc-code .o { color: #e8ecf2; }
  .pdoc-code .nb, .pdoc-code .kc, .pdoc-code .mi, .pdoc-code .s2, .pdoc-code .s1 { color: #7cc4a4; }
}
"""


def build(directory: Path) -> list[Path]:
    """Write the HTML of `MODULES` into `directory`, without network; the pages, that of the package first."""
    import pdoc  # here, since only those who build the reference have it
    import pdoc.render

    templates = directory / ".templates"
    templates.mkdir(parents=True, exist_ok=True)
    (templates / "custom.css").write_text(_DARK, encoding="utf-8")
    pdoc.render.configure(docformat="markdown", show_source=False, template_directory=templates)
    specs = [spec for module in MODULES for spec in (module, f"!{module}.")]
    pdoc.pdoc(*_in_order(specs), output_directory=directory)
    (templates / "custom.css").unlink()
    templates.rmdir()
    return [directory / f"{module.replace('.', '/')}.html" for module in MODULES]


def _in_order(specs: Sequence[str]) -> list[str]:
    """Each exclusion takes away what was named before it: the ones of packages come before modules inside of them."""
    return sorted(specs, key=lambda spec: spec.lstrip("!").count("."))


def cli_page() -> str:
    """The options of all commands as Markdown."""
    parser = chunkft_compile.cli._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    lines = [
        "# The command line",
        "",
        "Made from the parsers by `python -m docs.building.reference`; `chunkft COMMAND --help` says the same.",
        "",
        "| command | |",
        "|---|---|",
        *(f"| [`chunkft {name}`](#chunkft-{name}) | {_cell(helps[name])} |" for name in commands.choices),
        "",
        _exit_codes(),
    ]
    for name, command in commands.choices.items():
        lines += ["", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _exit_codes() -> str:
    """As the docstring of the command line has them."""
    return next(" ".join(part.split()) for part in (chunkft_compile.cli.__doc__ or "").split("\n\n") if part.startswith("Exit codes"))


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Its section: what it does, a table for each group of options, examples and notes."""
    yield f"## chunkft {name}"
    yield ""
    yield _cell(parser.description or "")
    for group in parser._action_groups:
        rows = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if rows:
            yield from ("", f"| {group.title or 'options'} | |", "|---|---|")
            yield from (f"| {_written(action)} | {_cell(_helped(parser, action))} |" for action in rows)
    if parser.epilog:
        yield from ("", "```", *parser.epilog.strip().splitlines(), "```")


def _written(action: argparse.Action) -> str:
    """How it is typed: `--seq N`, `--packing`, `MODEL`."""
    value = action.metavar if isinstance(action.metavar, str) else "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = value or action.dest.upper()
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{flag}{'' if action.nargs == 0 else ' ' + value}`" for flag in action.option_strings)


def _helped(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Its help with the default in it, as `--help` prints it."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"{text} (required)" if action.required and action.option_strings else text


def _cell(text: str) -> str:
    """For a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("*", "\\*")


def main(argv: Sequence[str] | None = None) -> None:
    """Write one of the two."""
    parser = argparse.ArgumentParser(description="Make the reference from docstrings and parsers.")
    parser.add_argument(
        "directory", type=Path, metavar="DIRECTORY", nargs="?", help=f"HTML of the Python reference (default: write {CLI_PAGE})"
    )
    directory = parser.parse_args(argv).directory
    if directory is None:
        CLI_PAGE.parent.mkdir(exist_ok=True)
        CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    else:
        build(directory)


if __name__ == "__main__":
    main()
