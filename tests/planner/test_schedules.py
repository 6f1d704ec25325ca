import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from chunkft_compile.planner.grounds import on_device, settle, spread
from chunkft_compile.planner.options import make_step
from chunkft_compile.planner.problem import Chunk, Link, Placement, Problem, Schedule, Segment, Update
from chunkft_compile.planner.schedules import compress, format_schedule, from_json, to_json
from chunkft_compile.planner.units import format_us
from tests.planner.planner_problems import plain_kind, problems

PROBLEM = Problem(
    budget_nbytes=2_100_000_000,
    static_nbytes=1_000_000_000,
    kinds=(plain_kind(saved=50_000_000, us=1500),),
    segments=tuple(Segment(name, 0, 0, 0) for name in ("prelude", "block 0", "block 1", "head")),
    chunks=tuple(Chunk(f"weight {s}", s, s, 100_000_000, 400_000_000, 500_000_000) for s in range(4)),
    links=(Link(Placement.HOST, 10**10, 10**10, 10**9), Link(Placement.DISK, 10**9, 10**9)),
    updates=tuple(Update),
)
GROUND = settle(PROBLEM, spread(PROBLEM, on_device(PROBLEM), resident={3}))
STEPS = (
    make_step(GROUND, (0,), ("keep",) * 4, Update.HELD),
    make_step(GROUND, (1, 2, 3), ("plain", "keep", "keep", "keep"), Update.IMMEDIATE),
)
SCHEDULE = Schedule(PROBLEM.budget_nbytes, STEPS, GROUND.places, "FEASIBLE", 0.0123, 0.5)

GOLDEN = """\
  step    chunks    trains  segments         depth    options    update         peak     time
------  --------  --------  ---------------  -------  ---------  ---------  --------  -------
   1/2         1  100.0 MB  prelude          prelude  4 keep     held       2.000 GB  92.0 ms
   2/2         3  300.0 MB  block 0-1, head  block 0  3 keep     immediate  2.050 GB   890 ms

FEASIBLE, gap 1.2%, T = 2, 982 ms per sweep, peak 2.050 GB of 2.100 GB
optimizer state: 400.0 MB on the device, 800.0 MB on the host, 400.0 MB on the disk (960 ms of transfers per sweep)
"""


def test_the_printed_schedule() -> None:
    assert format_schedule(PROBLEM, SCHEDULE) == GOLDEN.rstrip("\n")


def test_options_are_counted_from_the_depth_of_the_step_up() -> None:
    mixed = replace(STEPS[0], options=("plain", "keep", "plain", "keep"))
    row = format_schedule(PROBLEM, replace(SCHEDULE, steps=(mixed, STEPS[1]))).splitlines()[2]
    assert "  2 plain, 2 keep  " in row


def test_times_for_people() -> None:
    found = [format_us(us) for us in (850, 92_000, 99_949, 99_950, 982_500, 999_500, 1_077_100, 9_999_499, 9_999_500, 131_500_000)]
    expected = ["850 us", "92.0 ms", "99.9 ms", "100 ms", "982 ms", "1.000 s", "1.077 s", "9.999 s", "10.00 s", "131.5 s"]
    assert found == expected


def test_names_of_consecutive_segments_are_joined() -> None:
    assert compress(["prelude", "block 3", "block 4", "block 5", "block 7", "head"]) == "prelude, block 3-5, block 7, head"
    assert compress(["layers 9", "layers 10", "blocks 11"]) == "layers 9-10, blocks 11"


@settings(max_examples=50, deadline=None)
@given(problems(modes=True, places=True))
def test_problems_survive_a_round_trip(problem: Problem) -> None:
    assert from_json(to_json(problem), Problem) == problem


def test_schedules_survive_a_round_trip() -> None:
    assert from_json(to_json(SCHEDULE), Schedule) == SCHEDULE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 4', '"version": 2', "has version 2, this library reads version 4"),
        ('"type": "Schedule"', '"type": "Problem"', "holds a 'Problem', expected a 'Schedule'"),
        ('"status"', '"mood"', "Schedule has the unknown field 'mood'"),
        ('"update": "held"', '"update": "later"', "update must be one of held, immediate, got 'later'"),
        ('"us": 92000', '"us": "soon"', r"Schedule.steps\[0\].us must be of type int, got 'soon'"),
        ('"us": 92000', '"us": true', r"Schedule.steps\[0\].us must be of type int, got True"),
        ('"solve_s": 0.5', '"solve_s": 0.5, "extra": 1', "unknown field 'extra'"),
        ("{", "", "this is not JSON"),
    ],
)
def test_foreign_texts_are_refused(old: str, new: str, message: str) -> None:
    text = to_json(SCHEDULE)
    assert old in text
    with pytest.raises(ValueError, match=message):
        from_json(text.replace(old, new, 1), Schedule)


def test_missing_fields_and_wrong_shapes_are_refused() -> None:
    stored = json.loads(to_json(SCHEDULE))
    del stored["value"]["gap"]
    with pytest.raises(ValueError, match="Schedule lacks the field 'gap'"):
        from_json(json.dumps(stored), Schedule)
    stored["value"] = [1]
    with pytest.raises(ValueError, match="Schedule must be an object"):
        from_json(json.dumps(stored), Schedule)
    with pytest.raises(ValueError, match="the fields version, type and value"):
        from_json("[]", Schedule)
    bad_steps = {**json.loads(to_json(SCHEDULE))["value"], "steps": 3}
    with pytest.raises(ValueError, match=r"Schedule.steps must be a list"):
        from_json(json.dumps({**stored, "value": bad_steps}), Schedule)


def test_whole_numbers_are_read_as_floats() -> None:
    assert from_json(to_json(replace(SCHEDULE, gap=0)), Schedule).gap == 0.0
