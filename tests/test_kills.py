"""SIGKILL at any moment, resume each time: the end is that of a run that nobody interrupted, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]


def _killing(how: str, directory: Path, count: int) -> Any:
    """Run it in a process of its own, which has no threads when it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", how, str(directory), str(count), "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CHUNKFT_CACHE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_thirty_kills_at_random_moments(tmp_path: Path) -> None:
    found = _killing("random", tmp_path, 30)
    assert found["kills"] == 30
    assert set(found["digests"]) == {found["whole"]}


def test_kills_before_every_call_of_a_save(tmp_path: Path) -> None:
    found = _killing("writes", tmp_path, 60)
    assert found["all_calls"]
    assert found["kills"] >= 15
    assert 0 < found["kept"] < found["kills"]  # before and after the rename
    assert found["left"] == 2  # as many as are kept, and nothing of the writers that were killed
    assert found["digests"] == [found["whole"]]
