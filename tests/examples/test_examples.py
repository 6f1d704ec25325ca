"""Every example runs as its first lines say, and does what it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def _run(name: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CHUNKFT_CACHE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _losses(printed: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("step")]


def test_a_plain_loop() -> None:
    printed = _run("plain_loop.py")
    losses = _losses(printed)
    assert losses[-1] < losses[0] - 1
    assert re.search(r"chunks, \d+ steps a sweep, budget 8\.0 MB\npredicted peak [78]\.\d MB, plain AdamW needs 18\.\d MB", printed)


def test_torch_compile() -> None:
    printed = _run("torch_compile.py", "--steps", "31")
    losses = _losses(printed)
    assert losses[-1] < losses[0] - 1
    assert "steps a sweep, predicted peak" in printed


def test_the_trainer_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert "all of them trained in 7MB" in _run("trainer.py", "--out", out)
    printed = _run("trainer.py", "--out", out, "--steps", "80", "--resume")
    assert re.findall(r"'chunkft/budget_nbytes': 7000000", printed) == ["'chunkft/budget_nbytes': 7000000"]  # one log, of steps 61 to 80
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


def test_supervised_fine_tuning_learns_sums(tmp_path: Path) -> None:
    printed = _run("sft.py", "--out", str(tmp_path))
    assert "all of them trained in 7MB" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("7+5=")["input_ids"] == [9, 12, 7, 13]
