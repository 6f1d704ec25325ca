"""Runs the blocks of a page in a directory: python -m docs.building.running docs/first-hour.md"""

import argparse
import ast
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from pathlib import Path

from docs.building.links import made_images
from docs.building.outputs import difference
from docs.building.pages import ROOT, Block, Kind, Page, PageError, read_page

SECONDS = 280  # of one block; a test has 300
OWN_COMMANDS = Path(sys.executable).parent


class BlockError(AssertionError):
    """A block that failed or printed something else; the message begins with its path and line."""


def run_page(page: Page, directory: Path, commands: Path = OWN_COMMANDS) -> None:
    """Execute all of it in `directory`, which is made the current one meanwhile. `BlockError` at the first block that fails.

    `sh` blocks find `chunkft` in `commands`.
    """
    module = types.ModuleType(f"page_{page.path.stem.replace('-', '_').lower()}")
    module.__file__ = str(page.path)
    sys.modules[module.__name__] = module  # pickle and Dynamo look names up there
    try:
        with contextlib.chdir(directory), warnings.catch_warnings():
            warnings.simplefilter("default")  # a reader's session shows warnings of other libraries and goes on
            for block in page.blocks:
                _run(page, block, module, directory, commands)
        for name, line in made_images(page):
            if not (directory / name).exists():
                raise BlockError(f"{page.path}:{line}: the image {name} is neither in the repository nor made by a block of the page")
    finally:
        del sys.modules[module.__name__]


def _run(page: Page, block: Block, module: types.ModuleType, directory: Path, commands: Path) -> None:
    where = f"{page.path}:{block.line}"
    if block.kind is Kind.NOT_RUN:
        return
    if block.kind is Kind.FILE:
        target = directory / block.note
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.source)
        return
    printed = _python(block, module, where) if block.kind is Kind.PYTHON else _shell(block, where, commands)
    if block.expected is not None:
        differs = difference(printed, block.expected, directory)
        if differs:
            raise BlockError(f"{where}: this block does not print what the page shows\n{differs}")


def _python(block: Block, module: types.ModuleType, where: str) -> str:
    """What it prints. Tracebacks and `inspect` see the lines of the page."""
    printed = io.StringIO()
    try:
        tree = ast.parse(block.source, filename=str(module.__file__))
        ast.increment_lineno(tree, block.line - 1)
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, str(module.__file__), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BlockError(f"{where}: this block fails\n{printed.getvalue()}{''.join(traceback.format_exception(error))}") from error
    return printed.getvalue()


def _shell(block: Block, where: str, commands: Path) -> str:
    """What it prints; the stderr of what fails is in the error."""
    command = ["bash", "-euo", "pipefail", "-c", block.source]
    try:
        done = subprocess.run(command, env=environment(commands), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{where}: this block takes more than {SECONDS} s") from error
    if done.returncode != 0:
        raise BlockError(f"{where}: this block ends with exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def environment(commands: Path) -> dict[str, str]:
    """That of `sh` blocks: `commands` and this interpreter come first, it imports this repository, and there is no network."""
    mine = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    mine["PATH"] = os.pathsep.join([str(commands), str(OWN_COMMANDS), os.environ.get("PATH", os.defpath)])
    mine["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return mine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", metavar="PAGE", nargs="+", type=Path)
    parser.add_argument("--commands", type=Path, default=OWN_COMMANDS, metavar="DIR", help="where `chunkft` is (default: %(default)s)")
    args = parser.parse_args()
    for path in args.pages:
        with tempfile.TemporaryDirectory() as directory:
            try:
                run_page(read_page(path.resolve()), Path(directory).resolve(), args.commands)
            except (BlockError, PageError) as error:
                print(error, file=sys.stderr)
                return 1
        print(f"{path}: every block does what the page shows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
