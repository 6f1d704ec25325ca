"""`report`, `explain` and `diff` from the command line: formats, where they go, and readers that leave."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from chunkft_compile.cli import main
from chunkft_compile.planner import to_json
from tests.reports.plans import decoder
from tests.reports.test_runs import HEAD, PLAN, step, write

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for a device that was not there."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    file.write_text(to_json(decoder(1.2)))
    return file


def test_the_suffix_chooses_the_format(plan_file: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("plotly", reason="the page needs it: pip install plotly")
    for name in ("a.txt", "a.md", "a.html", "a.json", "a.pickle", "A.HTML"):
        assert main(["report", str(plan_file), "-o", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a.txt").read_text().splitlines()[1].startswith("----")
    assert (tmp_path / "a.md").read_text().startswith("# ")
    assert json.loads((tmp_path / "a.json").read_text())["type"] == "chunkft report"
    assert set(pickle.loads((tmp_path / "a.pickle").read_bytes())) >= {"device_traces", "segments"}
    for name in ("a.html", "A.HTML"):
        assert (tmp_path / name).read_text().lstrip().lower().startswith("<!doctype html>")


def test_a_format_that_is_given_wins(plan_file: Path, tmp_path: Path) -> None:
    assert main(["report", str(plan_file), "--format", "perfetto", "-o", str(tmp_path / "trace.json")]) == 0
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


@pytest.mark.parametrize("chosen", ["table", "markdown", "perfetto", "json"])
def test_standard_output(chosen: str, plan_file: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(plan_file), "--format", chosen]) == 0
    printed = capsys.readouterr().out
    assert main(["report", str(plan_file), "--format", chosen, "-o", str(tmp_path / "file")]) == 0
    assert (tmp_path / "file").read_text() == printed


@pytest.mark.parametrize("chosen", ["perfetto", "json"])
def test_what_is_for_programs_does_not_go_to_a_terminal(
    chosen: str, plan_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["report", str(plan_file), "--format", chosen]) == 1
    said = capsys.readouterr()
    assert f"{chosen} is for programs, not for a terminal: name a file with -o FILE" in said.err
    assert said.out == ""


def test_explain_and_diff_print(plan_file: Path, capsys: Capture) -> None:
    assert main(["explain", str(plan_file)]) == 0
    assert "\nWhy this peak\n" in capsys.readouterr().out
    assert main(["explain", str(plan_file), "--step", "1", "--at", "backward head"]) == 0
    assert capsys.readouterr().out.startswith("Memory in step 1, backward head\n")
    assert main(["diff", str(plan_file), str(plan_file)]) == 0
    assert capsys.readouterr().out.startswith("In the same budget the second plan is as fast: ")


def test_a_reader_that_leaves_is_no_error(plan_file: Path) -> None:
    """Nobody reads: the first write that reaches the pipe fails, however little it is."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "chunkft_compile.cli", "report", str(plan_file)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html"])
def test_a_recorded_run_is_compared(suffix: str, tmp_path: Path) -> None:
    plan, run, out = tmp_path / "plan.json", tmp_path / "run.jsonl", tmp_path / f"out{suffix}"
    plan.write_text(to_json(PLAN))
    write(run, [*HEAD, step(0, 0, extra_us=1000), step(1, 1)])
    assert main(["report", str(plan), "--run", str(run), "-o", str(out)]) == 0
    text = out.read_text()
    assert {".txt": "Planned against measured: 2 of 2 steps", ".md": "# Planned against measured", ".html": "<html"}[suffix] in text
    alone = tmp_path / f"alone{suffix}"
    assert main(["report", str(plan), "-o", str(alone)]) == 0
    assert len(text) > len(alone.read_text())
