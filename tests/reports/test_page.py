"""The report page: its data add up without a browser, and a browser shows and changes what they say."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from chunkft_compile.planner import Category, Fingerprint, Plan, plan, traces_of
from chunkft_compile.reports.page import make_page
from chunkft_compile.reports.points import points_around
from tests.planner.planner_problems import transformer

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</script><b onmouseover=alert(1)>&{{DATA}}"


def _plan(*, layers: int = 4, share: float = 0.35, name: str = "model.{}") -> Plan:
    problem = transformer(layers, share, tokens=512)
    chunks = tuple(replace(chunk, name=f"{name.format(index)}.weight[0:{index + 1}]") for index, chunk in enumerate(problem.chunks))
    problem = replace(problem, chunks=chunks)
    inputs = (f"input_ids {HOSTILE}",)
    made_for = Fingerprint("abc", tuple(chunk.name for chunk in chunks), inputs, "float32", "cpu", "AdamW", False, "2.13.0", "plain")
    return Plan(made_for, problem, plan(problem, time_limit_s=0.2))


def _data(page: str) -> dict[str, Any]:
    (packed,) = re.findall(r'id="data">([^<]*)</script>', page)
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return found


def test_every_number_is_that_of_the_plan() -> None:
    planned = _plan()
    data, traces = _data(make_page(planned, points=points_around(planned, count=3))), traces_of(planned)
    assert len(data["steps"]) == len(planned.schedule.steps) > 1
    for step, trace, own in zip(data["steps"], traces, planned.schedule.steps, strict=True):
        assert [(name, us, waited, peak) for name, us, waited, peak in step["instants"]] == [
            (instant.name, instant.us, instant.waited_us, instant.peak_nbytes) for instant in trace.instants
        ]
        live = [sum(n for _, _, n, first, last in step["lifetimes"] if first <= i <= last) for i in range(len(trace.instants))]
        workspace = trace.stacks()[Category.WORKSPACE]
        assert [a + b for a, b in zip(live, workspace, strict=True)] == [instant.peak_nbytes for instant in trace.instants]
        assert step["split"] == trace.time_split()
        assert (step["peak"], step["us"], step["chunks"]) == (own.peak_nbytes, own.us, len(own.chunks))
    trained = {(param["name"], start, stop): step for param in data["params"] for start, stop, step, _ in param["rows"]}
    for number, step in enumerate(planned.schedule.steps):
        for index in step.chunks:
            name, _, rows = planned.problem.chunks[index].name.rpartition("[")
            start, stop = map(int, rows[:-1].split(":"))
            assert trained.pop((name, start, stop)) == number
    assert not trained
    budgets = [budget for budget, _, _ in data["points"]]
    assert budgets == sorted(budgets)
    assert planned.schedule.budget_nbytes not in budgets


def test_what_a_plan_holds_is_text() -> None:
    page = make_page(_plan(name=HOSTILE.replace("{", "{{").replace("}", "}}") + "{}"), name=HOSTILE)
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<b onmouseover" not in outside
    assert "&lt;b onmouseover" in outside
    assert _data(page)["params"][0]["name"].startswith(HOSTILE)


def test_a_page_says_whether_its_figures_are_exact() -> None:
    offline = _plan()
    assert "Modelled, not measured" in make_page(offline)
    assert "Modelled" not in make_page(replace(offline, traces=traces_of(offline)))


@pytest.mark.parametrize(
    ("status", "gap", "says"),
    [
        ("OPTIMAL", 0.0, "proven best for these chunks"),
        ("FEASIBLE", 0.545, "no sweep of these chunks takes more than 54.5% less time"),  # which may be 2.2 times as fast
        ("GREEDY", 1.0, "nothing is proven"),
    ],
)
def test_a_gap_is_what_could_be_saved(status: str, gap: float, says: str) -> None:
    planned = _plan()
    planned = replace(planned, schedule=replace(planned.schedule, status=status, gap=gap))
    figures = re.findall(r"<dt>solver</dt><dd><b>(.*?)</b><span>(.*?)</span>", make_page(planned))
    assert [name for name, _ in figures] == [status]
    assert says in figures[0][1]


def test_without_plotly_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("chunkft_compile.reports.page.import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'chunkft_compile\[report\]'"):
        make_page(_plan())


def test_eighty_blocks_are_a_page_below_six_megabytes() -> None:
    assert len(make_page(_plan(layers=80))) < 6_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("no browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def _opened(browser: Any, path: Path, planned: Plan, **how: Any) -> tuple[Any, list[str]]:
    """A page with the report of a plan, and whatever went wrong or over the network so far."""
    path.write_text(make_page(planned, name="plan", points=points_around(planned, count=3)))
    page = browser.new_context(**how).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page, wrong


@pytest.mark.slow
def test_a_browser_shows_a_large_plan_at_once(browser: Any, tmp_path: Path) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan(layers=80))
    assert page.locator(".js-plotly-plot").count() == 6
    assert int(page.locator("html").get_attribute("data-ready")) < 4000  # ms; 2000 is the aim, and this machine may be busy
    assert wrong == []


@pytest.mark.slow
def test_steps_and_instructions_are_chosen_with_the_keyboard(browser: Any, tmp_path: Path) -> None:
    planned = _plan()
    page, wrong = _opened(browser, tmp_path / "page.html", planned)
    memory = page.locator("#memory")
    page.select_option("#step", "0")
    first = memory.get_attribute("aria-label")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert page.locator("#step").input_value() == "1"
    assert memory.get_attribute("aria-label") != first
    peak = page.locator("#there").inner_text()
    page.locator("#instant").focus()
    page.keyboard.press("Home")
    assert page.locator("#there").inner_text() != peak
    assert page.locator("#there").inner_text().startswith(f"1 of {len(traces_of(planned)[1].instants)}: forward prelude")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"param", "SUMMARY"} <= reached
    page.locator("#time-table summary").click()
    assert page.locator("#time-table tbody tr").count() == len(planned.schedule.steps)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"viewport": {"width": 390, "height": 800}}, {"color_scheme": "dark"}], ids=["phone", "dark"])
def test_phones_and_dark_rooms(browser: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan(), **how)
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 31)" if "color_scheme" in how else "rgb(255, 255, 255)")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#next").is_visible()
    assert wrong == []
