"""`chunkft train` on conversations, padded and packed, with the real engine; and a real Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chunkft_compile.cli import main
from tests.cli.test_chat import MARKED

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parents[2]


def conversations(directory: Path, count: int) -> Path:
    path = directory / "chats.jsonl"
    rows = [[("user", f"{i}"), ("assistant", "x" * (i % 7 + 1)), ("user", "?"), ("assistant", "y")] for i in range(count)]
    chats = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def events(capsys: Capture, kind: str) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, capsys.readouterr().out.splitlines()) if one["event"] == kind]


@pytest.mark.usefixtures("fake_engine")
def test_the_template_of_a_run_is_saved_with_its_model(model_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    template, data, out = tmp_path / "chat.jinja", conversations(tmp_path, 8), tmp_path / "out"
    template.write_text(MARKED)
    arguments = ["train", str(model_dir), "--data", str(data), "--chat-template", str(template), "--eval-data", str(data), "--packing"]
    assert main([*arguments, "--seq", "128", "--steps", "1", "--budget", "1GB", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "data: 2 sequences of 128 tokens (8 examples, packed), 8 held out" in said
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == MARKED


@pytest.mark.slow
@pytest.mark.usefixtures("captures_once")
def test_conversations_are_trained_on_packed_and_padded(model_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    """One batch of all examples has the same loss both ways, in a quarter of the sequences."""
    template, data = tmp_path / "chat.jinja", conversations(tmp_path, 8)
    template.write_text(MARKED)
    arguments = ["train", str(model_dir), "--data", str(data), "--chat-template", str(template), "--eval-fraction", "0", "--json"]
    arguments += ["--seq", "128", "--steps", "2", "--budget", "8MB", "--device", "cpu", "--seconds", "1", "--lr", "1e-2"]
    found = []
    for name, more in (("padded", ["--batch", "8"]), ("packed", ["--packing", "--batch", "2"])):
        assert main([*arguments, *more, "--out", str(tmp_path / name)]) == 0
        found.append([one["loss"] for one in events(capsys, "step")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][1] < found[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_told_to_end_says_how_to_go_on(model_dir: Path, text_file: Path, tmp_path: Path, signum: int, code: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "chunkft_compile.cli", "train", str(model_dir), "--data", str(text_file), "--out", str(out)]
    command += ["--seq", "16", "--steps", "100000", "--budget", "400kB", "--device", "cpu", "--seconds", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHUNKFT_CACHE": "0", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        process.send_signal(signum)
        rest = process.stdout.read().splitlines()
        said = process.stderr.read()
        assert process.wait() == code, said
    stopped = json.loads(rest[-1])
    assert stopped["event"] == "stopped"
    assert said.splitlines()[-1].endswith(f"go on with: {stopped['command']}")
    assert stopped["command"].startswith("python -m chunkft_compile.cli train ")
    assert Path(stopped["checkpoint"]).is_dir()
    assert not out.exists()
    resumed = [sys.executable, *stopped["command"].split()[1:]]
    with subprocess.Popen(resumed, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        plan = json.loads(process.stdout.readline())
        assert (plan["event"], plan["step"]) == ("plan", stopped["step"])
        process.send_signal(signum)
        process.send_signal(signum)
        process.communicate()
        assert process.returncode in (code, -signum)  # the second one may come when Python is past its last line
    assert Path(stopped["checkpoint"]).is_dir()
