"""What is installed is what the checkout shows: every module, once, under `chunkft_compile`."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from chunkft_compile.dynamo import chunkft

ROOT = Path(__file__).parents[1]
SOURCES = {"chunkft_compile": "chunkft_compile", "chunkft_compile/planner": "planner", "chunkft_compile/runtime": "runtime"}


def modules() -> set[str]:
    """Paths inside a wheel of all modules in the checkout."""
    found = set()
    for package, folder in SOURCES.items():
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder)
            # rglob() does not follow the links chunkft_compile/planner and chunkft_compile/runtime on every Python
            if not (folder == "chunkft_compile" and relative.parts[0] in ("planner", "runtime")):
                found.add(f"{package}/{relative.as_posix()}")
    return found


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {path.rpartition("/")[0].replace("/", ".") for path in modules()}
    assert folders == set(project()["tool"]["setuptools"]["packages"])


def test_the_links_lead_to_the_folders() -> None:
    for name in ("planner", "runtime"):
        link = ROOT / "chunkft_compile" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


@pytest.mark.parametrize("name", ["planner", "runtime"])
def test_the_installed_packages_are_the_folders(name: str) -> None:
    spec = importlib.util.find_spec(f"chunkft_compile.{name}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    assert [Path(path).resolve() for path in spec.submodule_search_locations] == [ROOT / name]


def test_the_backend_of_torch_compile_is_an_entry_point() -> None:
    """Dynamo loads it from there; a checkout installed before it was written does not have it yet."""
    (name, value), *others = project()["project"]["entry-points"]["torch_dynamo_backends"].items()
    assert (name, others) == ("chunkft", [])
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is chunkft


def test_imports_point_one_way() -> None:
    forbidden = {"planner": ("torch", "transformers", "chunkft_compile."), "runtime": ("ortools", "transformers", "chunkft_compile.")}
    allowed = {
        "planner": ("chunkft_compile.planner",),
        "runtime": ("chunkft_compile.planner", "chunkft_compile.runtime", "chunkft_compile.errors"),
    }
    for folder, prefixes in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            for name in _imports(path):
                assert not name.startswith(prefixes) or name.startswith(allowed[folder]), f"{path.name} imports {name}"


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def test_the_command_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chunkft_compile.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("chunkft ")


def test_a_wheel_and_a_source_archive_hold_every_module_once(tmp_path: Path) -> None:
    # the wheel is built from the source archive, as an installer without wheels does, so both are checked
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=_copy(tmp_path), capture_output=True, text=True, check=True)
    archive = tmp_path / done.stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(archive)]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.endswith(".py")) == sorted(modules())
    assert {"chunkft_compile/py.typed", "chunkft_compile/runtime/allocator.cpp"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"chunkft_compile", f"chunkft_compile-{project()['project']['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def _copy(tmp_path: Path) -> Path:
    """The files of the checkout that a build reads: building in place would leave its traces there."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    # --archive keeps the links
    subprocess.run(["cp", "--archive", "pyproject.toml", "README.md", "LICENSE", *SOURCES.values(), str(copy)], cwd=ROOT, check=True)
    return copy
