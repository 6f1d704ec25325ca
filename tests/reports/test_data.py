"""The data of a report: every field that is documented and no other, and figures that add up."""

import json
import re

from hypothesis import given

from chunkft_compile.planner import Plan, traces_of
from chunkft_compile.reports import data
from chunkft_compile.reports.data import VERSION, report_data, to_data
from tests.reports.plans import decoder, random_plans


@given(random_plans())
def test_it_is_json_and_adds_up(planned: Plan | None) -> None:
    if planned is None:
        return
    found = json.loads(to_data(planned))
    assert found == report_data(planned)
    assert (found["version"], found["type"], found["modelled"]) == (VERSION, "chunkft report", True)
    assert sum(step["us"] for step in found["steps"]) == found["sweep_us"]
    assert max(step["peak_nbytes"] for step in found["steps"]) == found["peak_nbytes"]
    assert sorted(index for step in found["steps"] for index in step["chunks"]) == list(range(len(found["chunks"])))
    for step in found["steps"]:
        peaks = [instant["peak_nbytes"] for instant in step["instants"]]
        assert [sum(column) for column in zip(*step["stacks"].values(), strict=True)] == peaks
        assert peaks[step["binding"]] == max(peaks) == step["peak_nbytes"]
        assert sum(us for what, us in step["time_us"].items() if what != "hidden transfers") == step["us"]
        assert all(0 <= lifetime["first"] <= lifetime["last"] < len(peaks) for lifetime in step["lifetimes"])


def test_every_field_is_documented() -> None:
    found = report_data(decoder(1.2))
    assert data.__doc__ is not None
    described = set(re.findall(r"\w+", data.__doc__))
    parts = [found, *found["segments"], *found["chunks"], *found["steps"]]
    parts += [part for step in found["steps"] for what in ("instants", "lifetimes") for part in step[what]]
    assert {name for part in parts for name in part} <= described


def test_a_lowered_plan_is_not_modelled(lowered: Plan) -> None:
    found = report_data(lowered)
    assert not found["modelled"]
    assert [len(step["instants"]) for step in found["steps"]] == [len(trace.instants) for trace in traces_of(lowered)]
