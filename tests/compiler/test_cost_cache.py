"""Measured operators on disk: found again, told apart by what they depend on, and never in the way."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile import cost_cache, costs
from chunkft_compile.cost_cache import CostCache, fingerprint, key_of
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.runtime.environment import cache_directory
from chunkft_compile.runtime.meter import CallCost, measure_calls

CPU = torch.device("cpu")
ONE = {"a": CallCost(10, 2, 0.25)}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is."""
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _graph(width: int = 8) -> fx.Graph:
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(4, width)
        node = graph.call_function(torch.ops.aten.exp.default, (x,))
        node.meta["val"] = torch.empty(4, width)
    graph.output((node,))
    return graph


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each measurement ran."""
    counts: list[int] = []

    def count(calls: Sequence[Any], device: torch.device) -> list[CallCost]:
        counts.append(len(calls))
        return measure_calls(calls, device)

    monkeypatch.setattr(costs, "measure_calls", count)
    return counts


@pytest.mark.usefixtures("directory")
def test_a_second_process_measures_nothing_and_finds_the_same(measured: list[int]) -> None:
    tables = []
    for _ in range(2):
        table, graph = OperatorCosts(CPU), _graph()
        table.measure([graph])
        tables.append([(table.us(node), table.temporary_nbytes(node)) for node in graph.nodes])
    assert measured == [1]
    assert tables[0] == tables[1]
    OperatorCosts(CPU).measure([_graph(), _graph(9)])
    assert measured == [1, 1]


def test_zero_turns_it_off(monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path) -> None:
    monkeypatch.setenv("CHUNKFT_CACHE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        OperatorCosts(CPU).measure([_graph()])
    assert measured == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKFT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("CHUNKFT_CACHE")
    assert cache_directory() == Path("/b/chunkft_compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/c/.cache/chunkft_compile")


def test_threads_and_versions_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {fingerprint(CPU)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1234)
        names.add(fingerprint(CPU))
    with monkeypatch.context() as patch:
        patch.setattr(cost_cache, "_device_name", lambda _: "another")
        names.add(fingerprint(CPU))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        names.add(fingerprint(CPU))
    assert len(names) == 4


def test_keys_do_not_depend_on_the_process() -> None:
    node = next(iter(_graph().find_nodes(op="call_function", target=torch.ops.aten.exp.default)))
    assert key_of(costs.signature(node)) == key_of(costs.signature(next(iter(_graph().find_nodes(op="call_function", target=node.target)))))
    assert "0x" not in repr(costs.signature(node))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 3}',
        '{"version": 3, "calls": []}',
        '{"version": 3, "calls": {"a": [1, 2]}}',
        '{"version": 3, "calls": {"a": [1, 2, NaN]}}',
        '{"version": 3, "calls": {"a": [-1, 2, 3.0]}}',
        '{"version": 3, "calls": {"a": [1.5, 2, 3.0]}}',
        '{"version": 3, "calls": {"a": [1, 2, true]}}',
        '{"version": 99, "calls": {"a": [1, 2, 3.0]}}',
        "[" * 100_000,
    ],
)
def test_a_broken_file_is_written_anew(text: str, directory: Path) -> None:
    cache = CostCache(CPU)
    cache.add(ONE)
    (file,) = directory.iterdir()
    file.write_text(text)
    assert cache.load() == {}
    cache.add(ONE)
    assert cache.load() == ONE
    assert json.loads(file.read_text())["version"] == 3


def test_two_writers_keep_each_others_calls_and_leave_no_litter(directory: Path) -> None:
    one, other = CostCache(CPU), CostCache(CPU)
    one.load()
    other.add({"b": CallCost(1, 1, 0.5)})
    one.add(ONE)
    assert CostCache(CPU).load() == {"b": CallCost(1, 1, 0.5), **ONE}
    assert len(list(directory.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_not_an_error(directory: Path, measured: list[int]) -> None:
    directory.write_text("a file where the directory would be")
    OperatorCosts(CPU).measure([_graph()])
    assert measured == [1]
    assert CostCache(CPU).load() == {}


def test_a_replacement_that_fails_leaves_the_old_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CostCache(CPU)
    cache.add(ONE)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.add({"b": CallCost(1, 1, 0.5)})
    assert cache.load() == ONE
    assert len(list(directory.iterdir())) == 1


@given(st.dictionaries(st.text(), st.builds(CallCost, st.integers(0), st.integers(), st.floats(0, 1e9))))
def test_round_trip(calls: dict[str, CallCost]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setenv("CHUNKFT_CACHE", name)
        CostCache(CPU).add(calls)
        assert CostCache(CPU).load() == calls
