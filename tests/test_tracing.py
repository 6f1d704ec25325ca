"""`TORCH_TRACE` holds what was captured, planned and run, `TORCH_LOGS` the package's logs; without them nothing is made."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_compile.planner import Plan, from_json
from tests.conftest import Workshop
from tests.invariants.harness import RESIDENT, compile_quickly, smallest_nbytes
from tests.models import PLAIN, compute_loss, vector_batch

MLP = PLAIN[0]

_SCRIPT = """
import torch
import chunkft_compile
model = chunkft_compile.compile(torch.nn.Linear(3, 2), 10**7)
model(torch.ones(1, 3)).sum().backward()
"""


def test_each_capture_plan_and_step_is_an_artifact(captures_once: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts: list[tuple[dict[str, str], str]] = []

    def trace(kind: str, metadata: Callable[[], dict[str, str]], *, payload_fn: Callable[[], str], expect_trace_id: bool) -> None:
        assert (kind, expect_trace_id) == ("artifact", False)
        artifacts.append((metadata(), payload_fn()))

    monkeypatch.setattr("chunkft_compile.tracing.trace_structured", trace)
    model = compile_quickly(MLP.build(), smallest_nbytes(captures_once, MLP, resident=True) * 13 // 10, **RESIDENT)
    artifacts.clear()  # of the search for that budget
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model.plan(vector_batch()["x"])
        while model.progress.sweep == 0:
            torch.autograd.backward(compute_loss(model, vector_batch()))
            optimizer.step()
            optimizer.zero_grad()
    steps = model.progress.steps
    assert steps > 1
    assert [metadata["name"] for metadata, _ in artifacts] == ["chunkft_joint_graph", "chunkft_plan", *steps * ["chunkft_program"]]
    assert [metadata["encoding"] for metadata, _ in artifacts[:3]] == ["string", "json", "string"]
    (_, graph), (_, plan), (_, program) = artifacts[:3]
    assert "torch.ops.aten.tanh_backward.default" in graph
    read = from_json(plan, Plan)
    assert isinstance(read, Plan)
    assert model.schedule is not None
    assert read.schedule.peak_nbytes == model.schedule.peak_nbytes
    assert ' FORWARD of part 0 {"code": 0, ' in program
    assert "\ncode 0:\ndef forward(self, args_list):" in program


def test_nothing_is_made_without_a_trace(captures_once: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise AssertionError("made for nobody")

    monkeypatch.setattr("chunkft_compile.tracing.to_json", fail)
    monkeypatch.setattr("torch._logging._internal.GET_DTRACE_STRUCTURED", False)
    monkeypatch.setattr("torch._logging._internal.trace_log.handlers", [])
    compile_quickly(MLP.build(), 10**8).plan(vector_batch()["x"])


@pytest.mark.slow
def test_the_variables_of_torch_are_enough(tmp_path: Path) -> None:
    variables = os.environ | {"TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+chunkft_compile"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=variables, capture_output=True, text=True, check=True)
    assert "chunkft_compile/session.py" in done.stderr
    assert "planned 2 chunks in 1 steps" in done.stderr
    (trace,) = tmp_path.iterdir()
    lines = [line for line in trace.read_text().splitlines() if '"artifact"' in line]
    names = [json.loads(line[line.index("{") :])["artifact"]["name"] for line in lines]
    assert [name for name in names if name.startswith("chunkft_")] == ["chunkft_joint_graph", "chunkft_plan", "chunkft_program"]
