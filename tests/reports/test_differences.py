"""`chunkft diff`: verdicts, what differs, and plans of different models."""

import re
from dataclasses import replace

import pytest

from chunkft_compile.planner import Chunk, Plan
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.reports.differences import differences, same_model
from chunkft_compile.reports.document import as_text
from tests.reports.plans import decoder, one_chunk_a_step, plan_of

TIGHT, ROOMY = decoder(1.0), decoder(1.5)


def rows_of(a: Plan, b: Plan, title: str) -> dict[str, tuple[str, ...]]:
    """Rows by their first cell."""
    (section,) = [section for section in differences(a, b) if section.title == title]
    return {row[0]: row[1:] for row in section.tables[0].rows}


def test_more_bytes_buy_speed() -> None:
    title = differences(TIGHT, ROOMY)[0].title
    steps = f"T {len(TIGHT.schedule.steps)} -> {len(ROOMY.schedule.steps)}"
    more = format_nbytes(ROOMY.schedule.budget_nbytes - TIGHT.schedule.budget_nbytes, up=True)
    ratio = TIGHT.schedule.sweep_us / ROOMY.schedule.sweep_us
    assert ratio > 1.1
    assert title.startswith(f"{more} more buy {ratio:.3g}x the speed: {steps}, ")
    assert differences(ROOMY, TIGHT)[0].title.startswith(f"{more} less, and {ratio:.3g}x as slow: ")


@pytest.mark.parametrize(
    ("times", "more", "verdict"),
    [
        (1.0, 0, "In the same budget the second plan is as fast: "),
        (0.5, 0, "In the same budget the second plan is 2x as fast: "),
        (2.0, 0, "In the same budget the second plan is 2x as slow: "),
        (1.0, 9, "9 B more buy nothing: "),
        (1.0, -9, "9 B less cost nothing: "),
        (2.0, 9, "9 B more, and yet 2x as slow: "),
        (0.5, -9, "9 B less, and 2x as fast: "),
        (0.25, 9, "9 B more buy 4x the speed: "),
    ],
)
def test_verdicts(times: float, more: int, verdict: str) -> None:
    schedule = TIGHT.schedule
    steps = tuple(replace(step, us=int(times * 2 * step.us)) for step in schedule.steps)
    twice = replace(schedule, steps=tuple(replace(step, us=2 * step.us) for step in schedule.steps))
    other = replace(TIGHT, schedule=replace(schedule, steps=steps, budget_nbytes=schedule.budget_nbytes + more))
    assert differences(replace(TIGHT, schedule=twice), other)[0].title.startswith(verdict)


def test_figures_and_their_changes() -> None:
    rows = rows_of(TIGHT, ROOMY, "Figures")
    a, b = TIGHT.schedule, ROOMY.schedule
    assert rows["budget"] == (
        format_nbytes(a.budget_nbytes),
        format_nbytes(b.budget_nbytes),
        f"+{format_nbytes(b.budget_nbytes - a.budget_nbytes)}",
    )
    assert rows["T"] == (str(len(a.steps)), str(len(b.steps)), str(len(b.steps) - len(a.steps)))
    assert rows["updates"][:2] == ("held", "held")
    assert re.fullmatch(r"\w+.*, step \d+", rows["peak at"][0])


def test_options_and_steps_that_changed() -> None:
    sections = {section.title: section for section in differences(TIGHT, ROOMY)}
    options = sections["Options"]
    changed = sum(int(row[0]) for row in options.tables[0].rows)
    assert options.sentences[0].startswith(f"{changed} of {len(TIGHT.problem.segments)} segments have other options")
    total = sum(chunk.grad_nbytes for chunk in TIGHT.problem.chunks)
    shares = [float(row[3].removesuffix("%")) for row in sections["What is trained when"].tables[0].rows]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    assert total > 0


def test_a_plan_and_itself() -> None:
    sections = {section.title: section for section in differences(TIGHT, TIGHT)}
    assert sections["Made for"].sentences == ("Both for the same model, batch, optimizer and device, with the same chunks.",)
    assert {row[3] for row in sections["Figures"].tables[0].rows} == {""}
    assert sections["Options"].sentences[0].startswith("0 of ")
    assert sections["What is trained when"].sentences[0].startswith("0 B of ")


def test_chunks_that_are_cut_elsewhere_are_compared_by_rows() -> None:
    """Halves of every chunk in the steps of the whole: nothing moves."""
    problem = TIGHT.problem
    halves: list[Chunk] = []
    for chunk in problem.chunks:
        start = int(chunk.name.rpartition("[")[2].partition(":")[0])
        name = chunk.name.rpartition("[")[0]
        half = replace(chunk, grad_nbytes=max(1, chunk.grad_nbytes // 2))
        halves += [replace(half, name=f"{name}[{row}:{row + 1}]") for row in (start, start + 1)]
    steps = tuple(replace(step, chunks=tuple(sorted(i for c in step.chunks for i in (2 * c, 2 * c + 1)))) for step in TIGHT.schedule.steps)
    places = replace(TIGHT.schedule.places, state=tuple(place for place in TIGHT.schedule.places.state for _ in range(2)))
    fingerprint = replace(TIGHT.fingerprint, chunks=tuple(half.name for half in halves))
    other = Plan(fingerprint, replace(problem, chunks=tuple(halves)), replace(TIGHT.schedule, steps=steps, places=places))
    assert same_model(TIGHT, other)
    sections = {section.title: section for section in differences(TIGHT, other)}
    assert sections["What is trained when"].sentences[0].startswith("0 B of ")
    assert [row[0] for row in sections["Made for"].tables[0].rows] == ["chunks"]


def test_hundreds_of_steps_stay_a_page() -> None:
    assert len(as_text(differences(one_chunk_a_step(TIGHT), ROOMY)).splitlines()) < 100


def test_plans_of_different_models_are_compared_by_figures() -> None:
    other = decoder(1.2, layers=2)
    assert not same_model(TIGHT, other)
    titles = [section.title for section in differences(TIGHT, other)]
    assert titles[0].startswith("Plans of different models: ")
    assert titles[1:] == ["Made for", "Figures"]
    assert "Only the first trains block 2 q, block 2 k, block 2 v and " in as_text(differences(TIGHT, other))


def test_another_batch_is_no_other_model() -> None:
    other = plan_of(TIGHT.problem, graph="def", inputs=("['input_ids'] int64 [4, 8]",))
    assert same_model(TIGHT, other)
    assert set(rows_of(TIGHT, other, "Made for")) == {"graph", "inputs"}


def test_modelled_and_exact_are_told_apart(lowered: Plan) -> None:
    first, second = differences(TIGHT, lowered)[0].sentences
    assert first.startswith("The first: Modelled, not measured")
    assert second.startswith("The second: Peaks are exact")
