import ast
import sys
from pathlib import Path

from chunkft_compile import planner

SOURCES = sorted(Path(planner.__file__).parent.glob("*.py"))


def test_everything_public_exists_and_no_module_shares_its_name() -> None:
    assert planner.__all__ == sorted(planner.__all__)
    assert all(hasattr(planner, name) for name in planner.__all__)
    assert not {path.stem for path in SOURCES} & set(planner.__all__)


def test_few_files_know_the_solver_and_the_table() -> None:
    cpsat = ["cpsat.py", "cpsat_model.py"]
    for package, owners in (("ortools", cpsat), ("tabulate", ["schedules.py"])):
        assert [path.name for path in SOURCES if f"from {package}" in path.read_text()] == owners


def test_the_planner_imports_no_torch() -> None:
    allowed = {"ortools", "tabulate", "chunkft_compile.planner"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                known = name.partition(".")[0] in sys.stdlib_module_names or any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
                assert known, f"{path.name} imports {name}"


def test_the_verifier_shares_no_code() -> None:
    text = next(path for path in SOURCES if path.name == "verifying.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith("from chunkft_compile")]
    assert imports == ["from chunkft_compile.planner.problem import Cost, Link, Placement, Problem, Role, Schedule, Step, Update"]
