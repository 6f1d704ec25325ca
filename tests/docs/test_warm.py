"""Commands forked from the warm process behave as those that start by themselves."""

import signal
import subprocess
import sys
from pathlib import Path

from docs.building.running import environment


def test_streams_exit_codes_and_directories(commands: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, env=environment(commands), cwd=tmp_path, capture_output=True, text=True, timeout=60)

    version = run(sys.executable, "-m", "chunkft_compile.cli", "--version")
    assert run("chunkft", "--version").stdout == version.stdout != ""
    wrong = run("chunkft", "explain", "gone.json")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "gone.json" in wrong.stderr
    assert run("chunkft", "no-such").returncode == 2

    (tmp_path / "page.md").write_text("```sh\nchunkft explain gone.json\n```\n")
    page = run("run-page", "page.md", "--commands", str(commands))
    assert page.returncode == 1
    assert "page.md:2: this block ends with exit code 1" in page.stderr
    assert "gone.json" in page.stderr


def test_signals_are_handed_on(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "```python\nprint(open('started', 'w').name)\nimport os, time\nos.write(1, b'here'), time.sleep(60)\n```\n"
    )
    command = ["run-page", "page.md", "--commands", str(commands)]
    with subprocess.Popen(command, env=environment(commands), cwd=tmp_path, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.read(4) == b"here"
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == -signal.SIGTERM
