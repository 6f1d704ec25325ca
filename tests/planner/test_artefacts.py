from dataclasses import replace

import pytest

from chunkft_compile.planner.artefacts import Fingerprint, Plan, PlanMismatch, check_fingerprint, traces_of
from chunkft_compile.planner.schedules import from_json, to_json
from tests.planner.test_schedules import PROBLEM, SCHEDULE

HERE = Fingerprint("abc", ("a[0:2]", "a[2:4]", "b[0:1]"), ("input_ids int64 [1, 8]",), "float32", "cpu", "AdamW", False, "2.13.0", "plain")


def test_a_plan_survives_a_round_trip() -> None:
    offline = Plan(HERE, PROBLEM, SCHEDULE)
    plan = replace(offline, traces=traces_of(offline))
    assert (offline.lowered, plan.lowered) == (False, True)
    for kept in (offline, plan):
        assert from_json(to_json(kept), Plan) == kept
    with pytest.raises(ValueError, match="holds a 'Schedule', expected a 'Plan'"):
        from_json(to_json(SCHEDULE), Plan)


def test_traces_are_those_of_the_steps() -> None:
    traces = traces_of(Plan(HERE, PROBLEM, SCHEDULE))
    with pytest.raises(ValueError, match="those of its steps"):
        Plan(HERE, PROBLEM, SCHEDULE, (replace(traces[0], instants=traces[0].instants[:1]), *traces[1:]))


def test_the_same_is_accepted() -> None:
    check_fingerprint(HERE, replace(HERE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "xyz"}, "graph: the plan knows abc, this model is xyz"),
        ({"chunks": ("a[0:2]", "a[2:4]")}, r"trained by the plan, not trainable here: b\[0:1\]"),
        ({"chunks": (*HERE.chunks, *"cdef")}, "trainable here, unknown to the plan: c, d, e and 1 more"),
        ({"chunks": HERE.chunks[::-1]}, "the same ones in another order"),
        ({"inputs": ("input_ids int64 [2, 8]",)}, r"inputs: the plan has input_ids int64 \[1, 8\], here it is input_ids int64 \[2, 8\]"),
        ({"optimizer": "SGD"}, "optimizer: the plan has AdamW, here it is SGD"),
        ({"accumulating": True}, "accumulating: the plan has False, here it is True"),
        ({"precision": "master"}, "precision: the plan has plain, here it is master"),
        ({"torch": "2.14.0"}, "torch: the plan has 2.13.0, here it is 2.14.0"),
    ],
)
def test_each_difference_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        check_fingerprint(HERE, replace(HERE, **change))  # type: ignore[arg-type]


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(PlanMismatch) as caught:
        check_fingerprint(HERE, replace(HERE, dtype="bfloat16", device="cuda"))
    assert len(str(caught.value).splitlines()) == 4
