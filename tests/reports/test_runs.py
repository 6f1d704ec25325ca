"""Recorded runs that are read back, what is wrong with others, and the figures of a comparison."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from chunkft_compile.planner import Fingerprint, Op, Plan, PlanMismatch, Update, traces_of
from chunkft_compile.reports.comparison import comparison_sections
from chunkft_compile.reports.document import as_markdown, as_text
from chunkft_compile.reports.runs import ComparedStep, Difference, Run, compare, read_run
from chunkft_compile.run_lines import Header, Line, Memory, PlanLine, ProgramLine, StepLine, to_text
from chunkft_compile.runtime.store import Traffic
from tests.planner.test_schedules import PROBLEM, SCHEDULE

MADE_FOR = Fingerprint("abc", ("a[0:2]",), ("input_ids int64 [1, 8]",), "float32", "cpu", "AdamW", False, "2.13.0", "plain")
_OFFLINE = Plan(MADE_FOR, PROBLEM, SCHEDULE)
PLAN = replace(_OFFLINE, traces=traces_of(_OFFLINE))
HEADER = Header(1, "0.1.0", "2.13.0", "cpu", PROBLEM.budget_nbytes, "2026-11-30T05:40:54.032+00:00", Memory.EXACT, "every peak is read")
PLAN_LINE = PlanLine(0, MADE_FOR, SCHEDULE)
NAMES = tuple(tuple(instant.name for instant in trace.instants) for trace in PLAN.traces)
PROGRAMS = (ProgramLine(0, 0, 0, NAMES[0]), ProgramLine(1, 0, 1, NAMES[1]), ProgramLine(2, 0, None, NAMES[0]))
HEAD: tuple[Line, ...] = (HEADER, PLAN_LINE, *PROGRAMS)


def step(number: int, program: int, extra_us: int = 0, extra_nbytes: int = 0, *, differs: str | None = None) -> StepLine:
    """A step of one of `PROGRAMS` that took as planned, but for its second instruction, which took so much more."""
    instants = PLAN.traces[program % 2].instants
    us = tuple(instant.us + extra_us * (place == 1) for place, instant in enumerate(instants))
    nbytes = tuple(instant.peak_nbytes + extra_nbytes * (place == 1) for place, instant in enumerate(instants))
    return StepLine(
        step=number,
        sweep=number // 2,
        program=program,
        differs=differs,
        loss=1.5,
        micro_batches=1,
        at_us=100 * number,
        wall_us=2 * sum(us),
        forward_us=sum(us),
        backward_us=0,
        update_us=0,
        peak_nbytes=max(nbytes),
        traffic=Traffic(1, 2, 3, 4, 5),
        instant_us=us,
        instant_nbytes=nbytes,
    )


def write(path: Path, lines: Sequence[Line], rest: str = "") -> Path:
    """A file of these lines."""
    path.write_text("".join(map(to_text, lines)) + rest)
    return path


def run_of(*steps: StepLine) -> Run:
    """A run of `PLAN`."""
    return Run(HEADER, (PLAN_LINE,), PROGRAMS, steps)


def text_of(plan: Plan, run: Run, *, markdown: bool = False) -> str:
    """What is printed of a run beside its plan."""
    sections = comparison_sections(compare(plan, run), run)
    return as_markdown(sections) if markdown else as_text(sections)


def test_a_run_survives_a_round_trip(tmp_path: Path) -> None:
    steps = step(0, 0), replace(step(1, 1), loss=None, peak_nbytes=None, instant_nbytes=None, differs="for a reason")
    found = read_run(write(tmp_path / "run.jsonl", [*HEAD, *steps]))
    assert found == Run(HEADER, (PLAN_LINE,), PROGRAMS, steps)


def test_losses_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    (found,) = read_run(write(tmp_path / "run.jsonl", [*HEAD, replace(step(0, 0), loss=float("inf"))])).steps
    assert found.loss == float("inf")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole = to_text(step(1, 1))
    for length in (1, len(whole) // 2, len(whole) - 1):
        found = read_run(write(tmp_path / "run.jsonl", [*HEAD, step(0, 0)], whole[:length]))
        assert found == replace(run_of(step(0, 0)), torn=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no complete line, not even a header"),
        ('{"header": {"ver', "holds no complete line, not even a header"),
        (to_text(PLAN_LINE), "line 1: the first line is a header"),
        (to_text(HEADER) * 2, "line 2: the first line is a header, and no other one"),
        (to_text(HEADER).replace('"version":1', '"version":9'), "line 1: this run has version 9, this library reads version 1"),
        (to_text(HEADER) + to_text(step(0, 0)), "line 2: this step ran program 0, and there are 0 so far"),
        (to_text(HEADER) + to_text(PROGRAMS[0]), "line 2: this program is of plan 0, and there are 0 so far"),
        (to_text(HEADER) + to_text(PLAN_LINE) + to_text(PROGRAMS[1]), "line 3: this is program 1, expected 0"),
        (to_text(HEADER) + to_text(PLAN_LINE) + to_text(replace(PROGRAMS[0], planned=2)), "line 3: this is step 2 of a schedule of 2"),
        (to_text(HEADER) + to_text(replace(PLAN_LINE, number=1)), "line 2: this is plan 1, expected 0"),
        (to_text(HEADER) + "{}\n", "line 2: expected an object with one of the fields header, plan, program, step"),
        (to_text(HEADER) + "\n", "line 2: not JSON"),
        (to_text(HEADER) + '{"step": {"step": 1\n' + to_text(PLAN_LINE), "line 2: not JSON"),
        (to_text(HEADER) + "\x00\x00\n", "line 2: not JSON"),
        (to_text(HEADER).replace('"exact"', '"guessed"'), "line 1: header.memory must be one of exact, at least, none, got 'guessed'"),
    ],
)
def test_anything_else_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(step(0, 0), program=-1), "line 6: this step ran program -1, and there are 3 so far"),
        (replace(step(0, 0), instant_nbytes=(1,)), "line 6: this step has 1 peaks, and its program 9 instructions"),
        (replace(step(0, 0), instant_us=(1,)), "line 6: this step has 1 times, and its program 9 instructions"),
        (replace(step(0, 0), instant_us=(1.5,)), r"line 6: step.instant_us\[0\] must be of type int, got 1.5"),  # type: ignore[arg-type]
        (replace(step(0, 0), wall_us="3"), "line 6: step.wall_us must be of type int, got '3'"),  # type: ignore[arg-type]
    ],
)
def test_steps_are_checked(tmp_path: Path, wrong: StepLine, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(write(tmp_path / "run.jsonl", [*HEAD, wrong]))


def test_other_files_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.jsonl cannot be read: .*No such file"):
        read_run(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="binary, line 1: 'utf-8' codec"):
        read_run(tmp_path / "binary")


def test_times_are_medians_and_peaks_maxima_over_sweeps() -> None:
    found = compare(PLAN, run_of(step(0, 0, 50, 7), step(1, 1), step(2, 0, 10, -3), step(3, 1), step(4, 0, 30), step(5, 0, 40)))
    first, second = found.steps
    planned = PLAN.traces[0].instants[1]
    assert (first.number, first.sweeps, second.number, second.sweeps) == (0, 4, 1, 2)
    assert (first.instants[1].planned_us, first.instants[1].measured_us) == (planned.us, planned.us + 30)
    assert (first.instants[1].planned_nbytes, first.instants[1].measured_nbytes) == (planned.peak_nbytes, planned.peak_nbytes + 7)
    assert first.measured_us - first.planned_us == found.measured_us - found.planned_us == 30
    assert found.times() == [Difference(0, 1, planned.name, planned.us, planned.us + 30)]
    assert [difference.over for difference in found.peaks()] == [7]
    assert found.times(most=0) == []
    assert found.by_op()[Op.FORWARD] == (
        sum(_us_of(one, Op.FORWARD) for one in (0, 1)),
        sum(_us_of(one, Op.FORWARD) for one in (0, 1)) + 30,
    )


def _us_of(number: int, op: Op) -> int:
    return sum(instant.us for instant in PLAN.traces[number].instants if instant.op is op)


def test_steps_that_differ_are_left_out_and_counted() -> None:
    steps = step(0, 0), step(1, 1, differs="a reason"), step(2, 2, differs="another"), step(3, 1, differs="a reason")
    found = compare(PLAN, run_of(*steps))
    assert [one.number for one in found.steps] == [0]
    assert found.left_out == (("a reason", 2), ("another", 1))
    with pytest.raises(ValueError, match=r"no step of this run can be compared with the plan: 2 \(a reason\), 1 \(another\)"):
        compare(PLAN, run_of(*steps[1:]))
    with pytest.raises(ValueError, match="with the plan: there are none"):
        compare(PLAN, run_of())


def test_of_several_plans_the_steps_of_this_one_are_taken() -> None:
    other = PlanLine(0, replace(MADE_FOR, optimizer="SGD"), SCHEDULE)
    programs = (PROGRAMS[0], replace(PROGRAMS[1], plan=1), replace(PROGRAMS[0], number=2, plan=1))
    run = Run(HEADER, (other, replace(PLAN_LINE, number=1)), programs, (step(0, 0), step(1, 1), step(2, 2)))
    found = compare(PLAN, run)
    assert [one.number for one in found.steps] == [0, 1]
    assert found.left_out == (("another plan", 1),)


STEPS = SCHEDULE.steps


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            replace(PLAN_LINE, fingerprint=replace(MADE_FOR, optimizer="SGD", dtype="bfloat16")),
            "dtype: .*\n  optimizer: the plan has AdamW",
        ),
        (replace(PLAN_LINE, schedule=replace(SCHEDULE, budget_nbytes=7)), "budget: the plan has 2100000000 bytes, the run has 7"),
        (replace(PLAN_LINE, schedule=replace(SCHEDULE, steps=STEPS[:1])), "steps of a sweep: the plan has 2, the run has 1"),
        (
            replace(PLAN_LINE, schedule=replace(SCHEDULE, steps=(replace(STEPS[0], update=Update.IMMEDIATE), STEPS[1]))),
            "step 1 has other update in the run: held and immediate\n",
        ),
        (
            replace(
                PLAN_LINE,
                schedule=replace(SCHEDULE, steps=(STEPS[0], replace(STEPS[1], options=("plain", "plain", *STEPS[1].options[2:])))),
            ),
            "step 2 has other options in the run: at place 1 keep and plain\n",
        ),
        (
            replace(PLAN_LINE, schedule=replace(SCHEDULE, places=replace(SCHEDULE.places, state=SCHEDULE.places.state[::-1]))),
            "places of state: . chunks differ, the first is number 0",
        ),
    ],
)
def test_every_difference_of_another_plan_is_named(line: PlanLine, message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        compare(PLAN, Run(HEADER, (line,), PROGRAMS, (step(0, 0),)))


def test_predictions_may_differ() -> None:
    """A kept schedule that runs on another day has times of its own."""
    steps = tuple(replace(one, us=one.us + 1, peak_nbytes=one.peak_nbytes + 1) for one in STEPS)
    line = replace(PLAN_LINE, schedule=replace(SCHEDULE, steps=steps, solve_s=3.0, status="OPTIMAL", gap=0.0))
    assert compare(PLAN, Run(HEADER, (line,), PROGRAMS, (step(0, 0),))).steps[0].sweeps == 1


def test_what_has_no_instructions_in_common_is_refused() -> None:
    with pytest.raises(PlanMismatch, match="for a device that was not there"):
        compare(_OFFLINE, run_of(step(0, 0)))
    renamed = replace(PROGRAMS[0], instants=(*NAMES[0][:-1], "update nobody"))
    with pytest.raises(PlanMismatch, match=r"step 1 has other instructions in the run, such as 'update' \(0 instead of 1\)"):
        compare(PLAN, replace(run_of(step(0, 0)), programs=(renamed,)))
    with pytest.raises(PlanMismatch, match="it ended before there was a plan"):
        compare(PLAN, Run(HEADER, (), (), ()))


def test_copies_that_begin_elsewhere_are_found_by_name() -> None:
    """The second and the third instruction have changed places, with what they took."""
    swapped = replace(PROGRAMS[0], instants=(NAMES[0][0], NAMES[0][2], NAMES[0][1], *NAMES[0][3:]))
    us, nbytes = list(step(0, 0, 50, 7).instant_us), list(step(0, 0, 50, 7).instant_nbytes or ())
    us[1:3], nbytes[1:3] = us[2:0:-1], nbytes[2:0:-1]
    ran = replace(step(0, 0, 50, 7), instant_us=tuple(us), instant_nbytes=tuple(nbytes))
    straight, moved = compare(PLAN, run_of(step(0, 0, 50, 7))), compare(PLAN, replace(run_of(ran), programs=(swapped,)))
    assert moved.steps == (replace(straight.steps[0], moved=True),)
    assert "copies of 1 steps (1) began elsewhere than planned" in text_of(PLAN, replace(run_of(ran), programs=(swapped,)))


def test_of_equal_names_the_first_is_the_first() -> None:
    trace = PLAN.traces[0]
    names = ["forward", "update", "update", *NAMES[0][3:]]
    instants = tuple(replace(instant, name=name) for instant, name in zip(trace.instants, names, strict=True))
    plan = replace(PLAN, traces=(replace(trace, instants=instants), PLAN.traces[1]))
    found = compare(plan, replace(run_of(step(0, 0, 50)), programs=(replace(PROGRAMS[0], instants=("update", "forward", *names[2:])),)))
    planned = [instant.us for instant in trace.instants]
    assert [instant.measured_us for instant in found.steps[0].instants[:3]] == [planned[1] + 50, planned[0], planned[2]]


GOLDEN = """\
Planned against measured: 2 of 2 steps of the sweep were recorded
-----------------------------------------------------------------
device cpu, torch 2.13.0, 5 steps from 2026-11-30T05:40:54.032+00:00 on
measured peaks are exact: every peak is read
left out: 1 x a reason
the last line of the run was cut off, as in a run that was killed

Steps
-----

  step    sweeps    planned time    measured    differs    planned peak    measured
------  --------  --------------  ----------  ---------  --------------  ----------
   1/2         3         92.0 ms     94.0 ms       +2 %        2.000 GB    2.000 GB
   2/2         1          890 ms      890 ms       +0 %        2.050 GB    2.050 GB
   all                    982 ms      984 ms       +0 %

What instructions do, in all steps above
----------------------------------------

operation      planned time    measured    differs
-----------  --------------  ----------  ---------
forward             12.0 ms     14.0 ms      +17 %
backward             890 ms      890 ms       +0 %
update              80.0 ms     80.0 ms       +0 %

Instructions whose times differ most (medians over sweeps)
----------------------------------------------------------

  step    number  instruction        planned    measured     over
------  --------  ---------------  ---------  ----------  -------
     1         2  forward block 0     1.5 ms      3.5 ms  +2.0 ms

Instructions whose peaks differ most
------------------------------------

  step    number  instruction        planned    measured     over
------  --------  ---------------  ---------  ----------  -------
     1         2  forward block 0   1.450 GB    1.450 GB  -5.0 kB
"""


def test_the_printed_comparison() -> None:
    run = run_of(step(0, 0, 2000, -5000), step(1, 1), step(2, 0, 3000, -6000), step(3, 1, differs="a reason"), step(4, 0, 1000, -9000))
    assert text_of(PLAN, replace(run, torn=True)) == GOLDEN


def test_the_comparison_as_markdown() -> None:
    lines = text_of(PLAN, run_of(step(0, 0))).splitlines()
    place = lines.index("Instructions whose times differ most (medians over sweeps)")
    assert lines[place + 2] == "None differ."
    marked = text_of(PLAN, run_of(step(0, 0, 1000)), markdown=True).splitlines()
    assert marked[0].startswith("# Planned against measured: 1 of 2 steps")
    assert [line for line in marked if line.startswith("## ")] == [
        "## Steps",
        "## What instructions do, in all steps above",
        "## Instructions whose times differ most (medians over sweeps)",
        "## Instructions whose peaks differ most",
    ]
    rows = [line for line in marked if line.startswith("|")]
    assert {line.count("|") for line in rows if "1/2" in line} == {8}


def test_a_slower_machine_is_told_apart_from_a_wrong_plan() -> None:
    def sentences(factor: float) -> list[str]:
        run = run_of(*(replace(one, instant_us=tuple(round(us * factor) for us in one.instant_us)) for one in (step(0, 0), step(1, 1))))
        return [line for line in comparison_sections(compare(PLAN, run), run)[0].sentences if "the machine was" in line]

    assert sentences(1.2) == []
    assert sentences(3) == [
        "the middle one of all forwards and backwards took 3.00 times as long as planned, half of them 3.00 to 3.00 times: "
        "the machine was slower, or busier, than when operators were measured"
    ]
    assert "took 0.50 times as long as planned" in sentences(0.5)[0]
    assert "the machine was faster, or had less else to do, than" in sentences(0.5)[0]


def test_a_long_sweep_shows_the_steps_that_differ_most() -> None:
    many = 30
    plan = replace(PLAN, schedule=replace(SCHEDULE, steps=STEPS[:1] * many), traces=PLAN.traces[:1] * many)
    line = replace(PLAN_LINE, schedule=plan.schedule)
    programs = tuple(ProgramLine(number, 0, number, NAMES[0]) for number in range(many))
    steps = tuple(replace(step(number, 0, 100 * number), program=number) for number in range(many))
    text = text_of(plan, Run(HEADER, (line,), programs, steps))
    assert "Steps (20 of 30, whose times differ most)" in text.splitlines()
    shown = [row.split()[0] for row in text.splitlines() if f"/{many} " in row]
    assert shown == [f"{number + 1}/{many}" for number in range(10, many)]
    compared: Sequence[ComparedStep] = compare(plan, Run(HEADER, (line,), programs, steps)).steps
    assert len(compared) == many
