"""The report page: its data add up without a browser, and a browser shows and changes what they say."""

import base64
import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from chunkft_compile.planner import Category, Fingerprint, Placement, Plan, plan, traces_of
from chunkft_compile.planner.units import format_nbytes, format_us
from chunkft_compile.reports.page import make_page
from chunkft_compile.reports.points import points_around
from chunkft_compile.reports.runs import Run
from chunkft_compile.run_lines import Header, Memory, PlanLine, ProgramLine, StepLine
from chunkft_compile.runtime.store import Traffic
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
    modelled, exact = make_page(offline), make_page(replace(offline, traces=traces_of(offline)))
    assert "Modelled, not measured" in modelled
    assert "It should fit:" in modelled
    assert "Modelled" not in exact
    assert "It fits:" in exact


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


def test_what_the_host_must_hold_is_said_at_the_top() -> None:
    planned = _plan()
    here = (Placement.DEVICE,) * len(planned.problem.segments)
    nbytes = sum(chunk.state_nbytes for chunk in planned.problem.chunks)
    for place, says in [
        (Placement.DISK, (format_nbytes(nbytes), f"{format_nbytes(nbytes)} optimizer state on disk")),
        (Placement.DEVICE, ("nothing", "optimizer state and weights stay on the device")),
    ]:
        places = replace(planned.schedule.places, state=(place,) * len(planned.problem.chunks), weights=here)
        page = make_page(replace(planned, schedule=replace(planned.schedule, places=places), traces=traces_of(planned)))
        assert re.findall(r"<dt>beside the device</dt><dd><b>(.*?)</b><span>(.*?)</span>", page) == [says]


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_on_light_and_on_dark() -> None:
    style = resources.files("chunkft_compile.reports").joinpath("assets", "page.css").read_text(encoding="utf-8")
    light, dark, *_ = re.findall(r":root[^{]*\{([^}]*--paper[^}]*)\}", style)
    for theme in (light, dark):
        colors = {
            name: "#" + "".join(2 * c if len(value) == 3 else c for c in value) for name, value in re.findall(r"--([\w-]+): #(\w+)", theme)
        }
        for category in Category:
            assert _contrast(colors[category.replace(" ", "-")], colors["paper"]) >= 3, category
        for words in ("ink", "soft", "accent", "warn"):
            assert _contrast(colors[words], colors["paper"]) >= 4.5, words


def _ran(planned: Plan) -> Run:
    """A run in which every step took twice its time and a tenth of its bytes less, instruction by instruction."""
    traces = planned.traces
    header = Header(1, "0.1.0", "2.13.0", "cpu", planned.schedule.budget_nbytes, "2026-11-30", Memory.EXACT, "added up by the allocator")
    programs = tuple(ProgramLine(n, 0, n, tuple(i.name for i in trace.instants)) for n, trace in enumerate(traces))
    steps = []
    for number, trace in enumerate(traces):
        us, nbytes = tuple(2 * i.us for i in trace.instants), tuple(i.peak_nbytes * 9 // 10 for i in trace.instants)
        times = {"at_us": 0, "wall_us": sum(us), "forward_us": sum(us), "backward_us": 0, "update_us": 0}
        steps.append(
            StepLine(
                step=number, sweep=0, program=number, differs=None, loss=None, micro_batches=1, **times,
                peak_nbytes=max(nbytes), traffic=Traffic(0, 0, 0, 0, 0), instant_us=us, instant_nbytes=nbytes,
            )
        )  # fmt: skip
    return Run(header, (PlanLine(0, planned.fingerprint, planned.schedule),), programs, tuple(steps))


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


def _opened(browser: Any, path: Path, planned: Plan, run: Run | None = None, **how: Any) -> tuple[Any, list[str]]:
    """A page with the report of a plan, and whatever went wrong or over the network so far."""
    path.write_text(make_page(planned, name="plan", run=run, points=points_around(planned, count=3)))
    page = browser.new_context(**how).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page, wrong


@pytest.mark.slow
def test_a_browser_shows_a_large_plan(browser: Any, tmp_path: Path) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan(layers=80))
    assert page.locator(".js-plotly-plot").count() == 7
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
    page.wait_for_selector("#time-table tbody tr")  # filled when the browser says that it is open
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


@pytest.mark.slow
def test_figures_read_as_everywhere_else(browser: Any, tmp_path: Path) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan())
    draw = random.Random(0)
    sizes = [0, 999, 1000, 1050, 1150, 1250, 999_949, 999_950, 999_999, 1_000_000, 999_949_999, 999_950_000, 1_000_500, 10**15, -1250]
    sizes += [draw.randrange(10 ** draw.randrange(1, 16)) for _ in range(500)]
    times = [
        0,
        999,
        1000,
        1150,
        1250,
        1350,
        1450,
        99_949,
        99_950,
        100_500,
        101_500,
        999_499,
        999_500,
        9_999_499,
        9_999_500,
        99_994_999,
        99_995_000,
    ]
    times += [draw.randrange(10 ** draw.randrange(1, 12)) for _ in range(500)]
    assert page.evaluate("(sizes) => sizes.map(formatBytes)", sizes) == [format_nbytes(size) for size in sizes]
    assert page.evaluate("(times) => times.map(formatTime)", times) == [format_us(us) for us in times]
    assert wrong == []


@pytest.mark.slow
def test_paper_has_the_whole_of_every_figure_in_light_colours(browser: Any, tmp_path: Path) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan(), viewport={"width": 1100, "height": 800}, color_scheme="dark")
    page.evaluate("""() => {
        window.printed = [];
        window.addEventListener("beforeprint", () => {
            const figures = [...document.querySelectorAll(".plot > .plot-container .main-svg")];
            const widths = figures.map((svg) => svg.getBoundingClientRect().width);
            window.printed.push([Math.max(...widths), getComputedStyle(document.body).backgroundColor]);
        });
    }""")
    (tmp_path / "page.pdf").write_bytes(page.pdf(prefer_css_page_size=True))
    ((width, background),) = page.evaluate("window.printed")
    assert 0 < width <= 680  # A4 and Letter less two margins of 12 mm have 703 and 725
    assert background == "rgb(255, 255, 255)"
    page.wait_for_function("document.querySelector('#memory .main-svg').getBoundingClientRect().width > 1000")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
    assert wrong == []


@pytest.mark.slow
def test_a_run_is_drawn_over_its_plan(browser: Any, tmp_path: Path) -> None:
    planned = _plan()
    planned = replace(planned, traces=traces_of(planned))
    page, wrong = _opened(browser, tmp_path / "page.html", planned, _ran(planned))
    page.select_option("#step", "1")
    took = page.evaluate("(id) => { const one = document.getElementById(id).data.at(-1); return [one.y[1], one.hovertext[1]]; }", "time")
    assert took[1] == f"measured {format_us(2 * sum(instant.us for instant in planned.traces[1].instants))}"
    nbytes = [instant.peak_nbytes * 9 // 10 for instant in planned.traces[1].instants]
    lines = page.evaluate("document.getElementById('memory').data.at(-1).hovertext")
    assert lines == [f"measured {format_nbytes(one)}" for one in nbytes]
    assert page.evaluate("document.getElementById('peaks').data.at(-1).hovertext[1]") == f"measured {format_nbytes(max(nbytes))}"
    assert f"measured {format_nbytes(max(nbytes))}" in page.locator("#binds").inner_text()
    told = page.locator("section[aria-labelledby=h-run]").inner_text()
    assert "took 2.00 times as long as planned, half of them 2.00 to 2.00 times: the machine was slower, or busier" in told
    assert wrong == []


@pytest.mark.slow
def test_names_are_text_in_a_browser_too(browser: Any, tmp_path: Path) -> None:
    page, wrong = _opened(browser, tmp_path / "page.html", _plan(name="<img src=x onerror=alert(1)>{}"))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.locator("#map-table summary").click()
    page.wait_for_selector("#map-table tbody tr")
    page.locator("#memory").scroll_into_view_if_needed()
    bars = page.locator("#memory .nsewdrag").bounding_box()
    page.mouse.move(bars["x"] + bars["width"] / 2, bars["y"] + 0.9 * bars["height"])
    page.wait_for_selector("#memory .hovertext")
    assert page.locator("img").count() == 0
    assert page.locator("#map-table").inner_text().count("<img src=x onerror=alert(1)>") >= 1
    assert wrong == []
