"""The report as tables: its figures are those of the plan, and hundreds of steps stay a page."""

from dataclasses import replace

from chunkft_compile.planner import Category, Placement, Plan, Update, traces_of
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.document import as_markdown, as_text
from chunkft_compile.reports.moments import categories_table, instant_name, largest_table, share, time_split, time_table
from chunkft_compile.reports.spans import Span, spans, trained
from chunkft_compile.reports.summary import by_place, fullest, summary
from tests.reports.plans import decoder, one_chunk_a_step

PLAN = decoder(1.2)


def test_the_headline_says_whether_it_fits_and_that_it_is_modelled() -> None:
    schedule = PLAN.schedule
    first, second, _, sure = summary(PLAN)[0].sentences
    assert summary(PLAN)[0].title == (
        f"{format_nbytes(schedule.peak_nbytes)} of {format_nbytes(schedule.budget_nbytes)}, T = {len(schedule.steps)}, "
        f"{format_us(schedule.sweep_us)} per sweep"
    )
    assert format_nbytes(schedule.budget_nbytes - schedule.peak_nbytes) in first
    assert f"trained once in {len(schedule.steps)} steps" in second
    assert sure.startswith("Modelled, not measured: nothing ran on rtx4090")


def test_a_lowered_plan_says_that_its_peaks_are_exact(lowered: Plan) -> None:
    text = as_text(summary(lowered))
    assert "Peaks are exact" in text
    assert "odelled" not in text


def test_every_section_is_there_in_both_forms() -> None:
    text, markdown = as_text(summary(PLAN)), as_markdown(summary(PLAN))
    for title in ("Steps", "Memory at the peak", "Time of a sweep", "What each step trains", "Placements", "Made for"):
        assert f"\n{title}\n---" in text
        assert f"\n## {title}\n" in markdown
    assert len(text.splitlines()) < 120


def test_a_row_for_each_step_or_for_several() -> None:
    long = one_chunk_a_step(PLAN)
    count = len(long.schedule.steps)
    assert count == len(long.problem.chunks) == 56
    rows = summary(long)[1].tables[0].rows
    assert len(rows) == 24
    assert sum(int(row[1]) for row in rows) == len(long.problem.chunks)
    covered = [number for span in spans(long.schedule) for number in range(span.first, span.last + 1)]
    assert covered == list(range(1, count + 1))
    assert len(as_text(summary(long)).splitlines()) < 200


def test_the_peak_adds_up() -> None:
    traces = traces_of(PLAN)
    trace = traces[fullest(traces)]
    number = trace.binding
    assert trace.peak_nbytes == PLAN.schedule.peak_nbytes
    live = trace.live_at(number)
    rows = largest_table(trace, number, most=3).rows
    assert [row[0] for row in rows] == [*(lifetime.name for lifetime in live[:3]), f"{len(live) - 3} more"]
    assert rows[3][2] == format_nbytes(sum(lifetime.nbytes for lifetime in live[3:]))
    *categories, (all_, nbytes, whole) = categories_table(trace, number).rows
    assert (all_, nbytes, whole) == ("all", format_nbytes(trace.peak_nbytes), "100.0%")
    assert {row[0] for row in categories} <= set(Category)
    assert instant_name(trace, number).endswith(f"(instruction {number + 1} of {len(trace.instants)})")


def test_the_time_adds_up_to_the_sweep() -> None:
    split = time_split(traces_of(PLAN))
    assert sum(us for what, us in split.items() if what != "hidden transfers") == PLAN.schedule.sweep_us
    assert time_table({"forward": 30, "update": 0, "hidden transfers": 90, "backward": 10}).rows == (
        ("forward", "30 us", "75.0%"),
        ("hidden transfers", "90 us", "beside compute"),
        ("backward", "10 us", "25.0%"),
        ("all", "40 us", "100.0%"),
    )
    assert share(1, 0) == "0.0%"


def test_what_is_trained_in_words() -> None:
    step = PLAN.schedule.steps[0]
    chunks = PLAN.problem.chunks
    of = {s: [index for index, chunk in enumerate(chunks) if chunk.segment == s] for s in range(len(PLAN.problem.segments))}

    def words(*indices: int) -> list[str]:
        return list(trained(PLAN.problem, Span(1, 1, (replace(step, chunks=tuple(sorted(indices))),))))

    assert words(*of[0], *of[1], *of[2]) == ["all of prelude, block 0-1"]
    names = [chunks[index].name for index in of[1][:4]]
    assert words(*of[1][:4]) == [f"4 of {len(of[1])} chunks of block 0: {', '.join(names[:3])} and 1 more"]
    assert words(of[1][0], of[2][0]) == [
        f"1 of {len(of[1])} chunks of block 0: {chunks[of[1][0]].name}",
        f"1 of {len(of[2])} chunks of block 1: {chunks[of[2][0]].name}",
    ]
    together = list(trained(PLAN.problem, Span(1, 2, tuple(replace(step, chunks=(of[s][0],)) for s in (1, 2)))))
    assert together == [f"1 of {len(of[1])} chunks of each of block 0-1"]


def test_places_are_counted() -> None:
    places = by_place(PLAN)
    assert sum(places["optimizer state"].values()) == sum(chunk.state_nbytes for chunk in PLAN.problem.chunks)
    resident = sum(PLAN.problem.chunks[index].state_nbytes for index in PLAN.schedule.resident)
    assert places["optimizer state"][Placement.DEVICE] == resident


def test_updates_are_named() -> None:
    both = decoder(1.2, updates=tuple(Update))
    assert {row[6] for row in summary(both)[1].tables[0].rows} <= {"held", "immediate", "held, immediate"}
