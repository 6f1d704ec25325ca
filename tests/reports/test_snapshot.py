"""The snapshot of an allocator: every byte of the traces, in a form that torch's own tools and its page can read."""

import io
import pickle
import pickletools
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from chunkft_compile.planner import Plan, traces_of
from chunkft_compile.reports.snapshot import to_snapshot
from tests.reports.plans import decoder, random_plans

# The page (torch/utils/viz/MemoryViz.js, 2.13.0) has a reader of its own for pickles, which knows these and no others.
READABLE = """
    APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT EMPTY_LIST EMPTY_TUPLE FRAME LIST LONG1
    LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE PROTO SETITEM SETITEMS SHORT_BINUNICODE STOP TUPLE TUPLE1 TUPLE2 TUPLE3
"""


def check(planned: Plan) -> dict[str, Any]:
    """Replay the events; at every instant the most bytes are those of the traces."""
    raw = to_snapshot(planned)
    operations = list(pickletools.genops(raw))
    assert {operation.name for operation, _, _ in operations} <= set(READABLE.split())
    assert operations[0][1] == 4
    snapshot: dict[str, Any] = pickle.loads(raw)
    (segment,), (events,) = snapshot["segments"], snapshot["device_traces"]
    live: dict[int, int] = {}
    tops, last = [], None
    for before, event in zip([None, *events], events, strict=False):
        match event["action"]:
            case "alloc":
                assert event["addr"] not in live
                live[event["addr"]] = event["size"]
                tops.append((event["frames"][1]["filename"], event["frames"][1]["line"], sum(live.values())))
            case "free_completed":
                assert before is not None
                # the page takes a request and the completion right behind it for one event
                assert (before["action"], before["addr"]) == ("free_requested", event["addr"])
                assert live.pop(event["addr"]) == event["size"]
            case "snapshot":
                assert last is None  # the first one
        ordered = sorted(live.items())
        assert all(address + nbytes <= following for (address, nbytes), (following, _) in pairwise(ordered))
        assert all(segment["address"] <= address and address + n <= segment["address"] + segment["total_size"] for address, n in ordered)
        assert last is None or event["time_us"] >= last
        last = event["time_us"]
    peaks: dict[tuple[str, int], int] = {}
    for step, line, nbytes in tops:
        peaks[step, line] = max(peaks.get((step, line), 0), nbytes)
    traces = traces_of(planned)
    for number, trace in enumerate(traces, 1):
        for n, instant in enumerate(trace.instants, 1):
            at = f"step {number} of {len(traces)}", n
            assert peaks.get(at, instant.peak_nbytes) <= instant.peak_nbytes
    assert max(nbytes for _, _, nbytes in tops) == planned.schedule.peak_nbytes
    blocks = segment["blocks"]
    assert sum(block["size"] for block in blocks) == segment["total_size"]
    assert {block["address"]: block["size"] for block in blocks if block["state"] == "active_allocated"} == live
    return snapshot


@given(random_plans())
def test_the_events_add_up_to_the_peaks(planned: Plan | None) -> None:
    if planned is not None and planned.schedule.peak_nbytes:
        check(planned)


def test_a_lowered_plan(lowered: Plan) -> None:
    snapshot = check(lowered)
    names = [event["frames"][0]["name"] for event in snapshot["device_traces"][0] if event["action"] == "alloc"]
    lifetimes = {lifetime.name for trace in lowered.traces for lifetime in trace.lifetimes}
    assert lifetimes <= set(names)
    # weights are there all the time: one allocation, however many steps there are
    assert names.count("weights, buffers and batch") == 1
    assert any(name.startswith("workspace of backward") for name in names)


def test_the_page_finds_the_category_that_it_wants() -> None:
    events = check(decoder(1.2))["device_traces"][0]
    assert events[0]["category"] == "unknown"
    assert {"weights", "gradients", "optimizer state", "workspace"} <= {event["category"] for event in events}


def run_memory_viz(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """`python -m torch.cuda._memory_viz`, here; what it prints."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["_memory_viz", *arguments])
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.delitem(sys.modules, "torch.cuda._memory_viz", raising=False)  # or runpy warns that it runs twice
    runpy.run_module("torch.cuda._memory_viz", run_name="__main__")
    monkeypatch.undo()
    return printed.getvalue()


@pytest.mark.parametrize("kind", ["trace_plot", "segment_plot"])
def test_torch_makes_its_page_of_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, page = tmp_path / "plan.pickle", tmp_path / "page.html"
    source.write_bytes(to_snapshot(decoder(1.2)))
    run_memory_viz([kind, str(source), "-o", str(page)], monkeypatch)
    assert "MemoryViz.js" in page.read_text()
    assert len(page.read_bytes()) > source.stat().st_size


def test_torch_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "plan.pickle"
    source.write_bytes(to_snapshot(decoder(1.2)))
    # `stats` raises where the blocks of a segment do not add up to it
    assert "segments: 1\n" in run_memory_viz(["stats", str(source)], monkeypatch)
    events = pickle.loads(source.read_bytes())["device_traces"][0]
    assert run_memory_viz(["trace", str(source)], monkeypatch).startswith(f"Device 0 ----------------\n{len(events)} entries\n")
