"""Training passes under a cap of the kernel and under a device's capacity, and what must not pass ends cleanly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.allocator import allocator_or_skip

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cap", ["process", "device"])
def test_the_caps_hold(cap: str) -> None:
    allocator_or_skip()
    sizes = ["--layers", "1", "--budget", "380MB", "--device-layers", "1", "--device-budget", "380MB", "--also"]
    command = [sys.executable, "-m", "benchmarks.cap", "--only", cap, *sizes]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(cap)]
    assert [("trained" in row, "Error" in row) for row in rows] == (
        [(True, False), (False, True), (False, True)] if cap == "process" else [(True, False), (False, True)]
    )
