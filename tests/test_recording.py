"""A recorded run trains the same bits, and its file says what every instruction took."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

import chunkft_compile
from chunkft_compile import ChunkedModule, MemoryPromiseError, TrainingError
from chunkft_compile.planner import Op, Plan, PlanMismatch, Update, from_json
from chunkft_compile.reports.comparison import comparison_sections
from chunkft_compile.reports.runs import Run, compare, read_run
from chunkft_compile.run_lines import Memory
from chunkft_compile.run_writer import BROKEN, PART, REPLANNED, SMALLER, Recording
from chunkft_compile.runtime.engine import Run as EngineRun
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Mlp, compute_loss, llama, token_batch, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once", "allocator")

HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE
PLENTY = 10**8


def _compiled(**settings: Any) -> ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(llama().train(), PLENTY, update="auto", **settings)


def _step(model: ChunkedModule, optimizer: Optimizer, seeds: tuple[int, ...], recording: Any = None, **batch: int) -> float:
    """One optimizer step of as many micro-batches."""
    total = 0.0
    for seed in seeds:
        loss = compute_loss(model, token_batch(seed, **batch))
        torch.autograd.backward(loss)
        total += loss.item()
    if recording is not None:
        recording.note_loss(total)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _train(model: ChunkedModule, optimizer: Optimizer, path: Path | None, *, sweeps: int = 2, micro: int = 1) -> list[float]:
    losses: list[float] = []
    with chunkft_compile.record(model, path) if path is not None else nullcontext() as recording:
        while not losses or model.progress.sweep < sweeps:
            first = len(losses) * micro
            losses.append(_step(model, optimizer, tuple(range(first, first + micro)), recording))
    return losses


def _ran(run: Run) -> list[tuple[int, int | None, str | None]]:
    """Of every step, its plan, which step of it it was, and what set it apart."""
    programs = [run.programs[step.program] for step in run.steps]
    return [(program.plan, program.planned, step.differs) for program, step in zip(programs, run.steps, strict=True)]


def _kept(model: ChunkedModule, directory: Path) -> Plan:
    model.save_schedule(directory / "plan.json")
    return from_json((directory / "plan.json").read_text(), Plan)  # without `verify`, which knows nothing of plans by hand


WAYS: dict[str, dict[str, Any]] = {
    "held": {"updates": [HELD] * 3},
    "immediate": {"updates": [IMMEDIATE]},
    "both": {"updates": [IMMEDIATE, HELD], "option": "cheap"},
    "accumulation": {"updates": [HELD] * 2, "micro": 3},
    "streamed": {"updates": [HELD, IMMEDIATE], "away": True, "option": "offload"},
}


@pytest.mark.parametrize("way", WAYS)
def test_recording_changes_no_bit_and_peaks_are_those_that_were_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    settings = dict(WAYS[way])
    updates, micro = settings.pop("updates"), settings.pop("micro", 1)
    plan_by_hand(monkeypatch, updates, **settings)
    found = []
    for path in (None, tmp_path / "run.jsonl"):
        model = _compiled(accumulation=micro > 1)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        losses = _train(model, optimizer, path, micro=micro)
        found.append((losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)

    plan, run = _kept(model, tmp_path), read_run(tmp_path / "run.jsonl")
    assert [step.loss for step in run.steps] == losses
    assert _ran(run) == 2 * [(0, number, None) for number in range(len(updates))]
    assert len(run.programs) == len(updates)
    assert [step.sweep for step in run.steps] == [0] * len(updates) + [1] * len(updates)
    assert {step.micro_batches for step in run.steps} == {micro}
    _check_times(run)
    assert sum(step.traffic.read_nbytes for step in run.steps) == model.traffic.read_nbytes
    assert sum(step.traffic.written_nbytes for step in run.steps) == model.traffic.written_nbytes > 0

    compared = compare(plan, run)
    assert [(step.number, step.sweeps) for step in compared.steps] == [(number, 2) for number in range(len(updates))]
    for step, planned in zip(compared.steps, plan.schedule.steps, strict=True):
        assert not step.moved
        assert step.planned_nbytes == planned.peak_nbytes
        assert step.measured_nbytes is not None
        assert step.measured_nbytes <= step.planned_nbytes <= 1.02 * step.measured_nbytes
        for instant in step.instants:
            assert instant.measured_nbytes is not None
            assert instant.measured_nbytes <= instant.planned_nbytes
    fullest = max(compared.steps, key=lambda step: step.planned_nbytes)
    assert fullest.measured_nbytes == fullest.planned_nbytes == plan.schedule.peak_nbytes


def _check_times(run: Run) -> None:
    """Those of instructions add up to those of phases, and these fit into that of the step."""
    for step in run.steps:
        phases, instants = step.forward_us + step.backward_us + step.update_us, sum(step.instant_us)
        if step.micro_batches == 1:
            assert abs(phases - instants) <= len(step.instant_us)  # they are rounded one by one
        else:
            assert instants < phases < step.micro_batches * instants
        assert 0 < phases <= step.wall_us
        assert step.forward_us > 0 < step.backward_us
    ends = [step.at_us for step in run.steps]
    assert ends == sorted(ends)
    assert run.header.memory is Memory.EXACT


def _recorded(monkeypatch: pytest.MonkeyPatch, path: Path, *updates: Update) -> tuple[ChunkedModule, Optimizer]:
    """One sweep."""
    plan_by_hand(monkeypatch, updates)
    model = _compiled()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    _train(model, optimizer, path, sweeps=1)
    return model, optimizer


def test_every_line_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, _ = _recorded(monkeypatch, tmp_path / "run.jsonl", HELD, HELD)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["header"], ["plan"], ["program"], ["step"], ["program"], ["step"]]
    header, plan, program, step = lines[0]["header"], lines[1]["plan"], lines[2]["program"], lines[3]["step"]
    assert (header["device"], header["budget_nbytes"], header["torch"]) == ("cpu", PLENTY, str(torch.__version__))
    assert plan["fingerprint"]["chunks"] == [chunk.name for chunk in model.chunks]
    assert len(program["instants"]) == len(step["instant_us"])
    assert set(step["traffic"]) == {"read_nbytes", "written_nbytes", "reading_us", "writing_us", "waiting_us"}


def test_every_step_is_in_the_file_once_it_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So a run that is killed leaves all but the step under way."""
    plan_by_hand(monkeypatch, [HELD, HELD])
    model = _compiled()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with chunkft_compile.record(model, tmp_path / "run.jsonl") as recording:
        with pytest.raises(TrainingError, match=r"no step is under way .* before optimizer.step\(\)"):
            recording.note_loss(1.0)
        for seed in range(3):
            _step(model, optimizer, (seed,), recording)
            assert [step.step for step in read_run(tmp_path / "run.jsonl").steps] == list(range(seed + 1))
        with pytest.raises(TrainingError, match="no step is under way"):
            recording.note_loss(1.0)


@pytest.mark.slow
def test_a_killed_run_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    script = """
        import os, signal, sys, torch, chunkft_compile
        model = chunkft_compile.compile(torch.nn.Linear(3, 2), 10**7, solve_seconds=0.5)
        optimizer = torch.optim.AdamW(model.parameters())
        with chunkft_compile.record(model, sys.argv[1]):
            for step in range(4):
                model(torch.ones(1, 3)).sum().backward()
                if step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.step()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    run = read_run(path)
    assert [step.step for step in run.steps] == [0, 1, 2]
    assert not run.torn


def test_a_run_of_another_plan_is_refused_by_its_differences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _recorded(monkeypatch, tmp_path / "run.jsonl", HELD, HELD)
    run = read_run(tmp_path / "run.jsonl")
    plan_by_hand(monkeypatch, [HELD, HELD], scattered=True)
    model = _compiled()
    optimizer = AdamW(model.parameters())
    model.plan(**token_batch())
    with pytest.raises(PlanMismatch, match=r"step 1 has other chunks in the run: at place 1 2 and 1, and so do 1 more steps"):
        compare(_kept(model, tmp_path), run)
    del optimizer
    model = _compiled()
    optimizer = torch.optim.SGD(model.parameters())  # type: ignore[assignment]
    model.plan(**token_batch())
    with pytest.raises(PlanMismatch, match=r'\("here"\) is of another plan:\n  optimizer: the plan has SGD, here it is AdamW\nway out'):
        compare(_kept(model, tmp_path), run)
    del optimizer


def test_unplanned_accumulation_is_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD, HELD])
    model = _compiled()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    _train(model, optimizer, tmp_path / "run.jsonl", micro=2)
    run = read_run(tmp_path / "run.jsonl")
    assert [plan.fingerprint.accumulating for plan in run.plans] == [False, True]
    assert _ran(run) == [(1, 0, REPLANNED), (1, 1, None), (1, 0, None), (1, 1, None)]
    compared = compare(_kept(model, tmp_path), run)
    assert compared.left_out == ((REPLANNED, 1),)
    assert [(step.number, step.sweeps) for step in compared.steps] == [(0, 1), (1, 2)]


def test_a_larger_batch_is_planned_again_and_a_smaller_one_is_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD])
    model = _mlp("held")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with chunkft_compile.record(model, tmp_path / "run.jsonl"):
        for rows in (4, 6, 5, 6):
            _step_mlp(model, optimizer, rows)
    run = read_run(tmp_path / "run.jsonl")
    assert _ran(run) == [(0, 0, None), (1, 0, None), (1, 0, SMALLER), (1, 0, None)]
    compared = compare(_kept(model, tmp_path), run)
    assert compared.left_out == (("another plan", 1), (SMALLER, 1))
    assert [step.sweeps for step in compared.steps] == [2]


def test_a_step_that_an_error_broke_off_is_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD])
    model = _compiled()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with chunkft_compile.record(model, tmp_path / "run.jsonl"):
        for number in range(2):
            loss = compute_loss(model, token_batch())
            if number == 0:
                del loss  # and no backward
                _step(model, optimizer, (0,))
            else:
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert [step.differs for step in read_run(tmp_path / "run.jsonl").steps] == [BROKEN, None]


def _mlp(update: str) -> ChunkedModule:
    torch.manual_seed(0)
    return compile_quickly(Mlp(), PLENTY, update=update)


def _step_mlp(model: ChunkedModule, optimizer: Optimizer, rows: int = 4) -> None:
    torch.autograd.backward(compute_loss(model, vector_batch(rows=rows)))
    optimizer.step()
    optimizer.zero_grad()


def test_the_rest_of_a_broken_step_is_no_planned_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [IMMEDIATE])
    model = _mlp("immediate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    execute = EngineRun._execute

    def interrupt(run: EngineRun, instruction: Any) -> None:
        execute(run, instruction)
        if (instruction.op, instruction.segment) == (Op.BACKWARD, 1):
            raise KeyboardInterrupt

    with chunkft_compile.record(model, tmp_path / "run.jsonl"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineRun, "_execute", interrupt)
            with pytest.raises(KeyboardInterrupt):
                _step_mlp(model, optimizer)
        _step_mlp(model, optimizer)
        _step_mlp(model, optimizer)
    run = read_run(tmp_path / "run.jsonl")
    assert _ran(run) == [(0, None, PART), (0, 0, None)]
    assert compare(_kept(model, tmp_path), run).left_out == ((PART, 1),)


def test_two_optimizers_share_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD])
    model = _mlp("held")
    leaves = list(model.parameters())
    optimizers = [AdamW(leaves[::2], lr=1e-2), AdamW(leaves[1::2], lr=1e-2)]
    with chunkft_compile.record(model, tmp_path / "run.jsonl"):
        for _ in range(2):
            torch.autograd.backward(compute_loss(model, vector_batch()))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    run, plan = read_run(tmp_path / "run.jsonl"), _kept(model, tmp_path)
    assert [(step.step, step.differs) for step in run.steps] == [(0, None), (1, None)]
    _check_times(run)
    for step in run.steps:
        for instant, us in zip(plan.traces[0].instants, step.instant_us, strict=True):
            assert us > 0 or instant.op is Op.FREE, f"{instant.name} was not seen"


def test_without_a_gauge_times_are_recorded_and_the_header_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHUNKFT_GUARD", "0")
    model, _ = _recorded(monkeypatch, tmp_path / "run.jsonl", HELD)
    run = read_run(tmp_path / "run.jsonl")
    assert (run.header.memory, run.header.memory_note) == (Memory.NONE, "CHUNKFT_GUARD=0 turns the gauge off")
    assert [(step.peak_nbytes, step.instant_nbytes, step.differs) for step in run.steps] == [(None, None, None)]
    compared = compare(_kept(model, tmp_path), run)
    assert compared.steps[0].measured_nbytes is None
    assert compared.peaks() == []
    assert "memory was not measured: CHUNKFT_GUARD=0 turns the gauge off" in comparison_sections(compared, run)[0].sentences


def test_a_broken_promise_is_told_as_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD])
    model = _mlp("held")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    execute, kept = EngineRun._execute, []

    def leak(run: EngineRun, instruction: Any) -> None:
        execute(run, instruction)
        kept.append(torch.empty(10**6))

    monkeypatch.setattr(EngineRun, "_execute", leak)
    with chunkft_compile.record(model, tmp_path / "run.jsonl"), pytest.raises(MemoryPromiseError):
        _step_mlp(model, optimizer)
    assert read_run(tmp_path / "run.jsonl").steps == ()


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_by_hand(monkeypatch, [HELD])
    path = tmp_path / "run.jsonl"
    with pytest.raises(TypeError, match="not a Mlp; for one under"), chunkft_compile.record(Mlp(), path):
        pass
    assert not path.exists()
    model = _mlp("held")
    with chunkft_compile.record(torch.compile(model, backend="eager"), path):  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match="being recorded already"), chunkft_compile.record(model, tmp_path / "other.jsonl"):
            pass
        optimizer = AdamW(model.parameters())
        _step_mlp(model, optimizer)
    with pytest.raises(FileExistsError, match=r"run\.jsonl is there already"), chunkft_compile.record(model, path):
        pass
    _step_mlp(model, optimizer)
    assert len(read_run(path).steps) == 1


def test_a_full_disk_ends_the_recording_and_not_the_training(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plan_by_hand(monkeypatch, [HELD])
    model = _mlp("held")
    optimizer = AdamW(model.parameters())
    session = model._session
    caplog.set_level("WARNING", "chunkft_compile")
    with Path("/dev/full").open("wb", buffering=0) as full:
        session.recording = Recording(full, session.device, PLENTY, session.guard, session.stores.traffic)
        for _ in range(2):
            _step_mlp(model, optimizer)
        session.recording.finish()
    assert session.recording.failed
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [
        "the recording of this run ends here, training goes on"
    ]
