"""The pages in a browser: a run is watched, a diff read, trajectories searched, runs compared.

Pictures of the main views are written to `$SIA_SCREENSHOTS`, or to `build/screenshots`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from made_runs import make_run
from sia import rundir

pytest.importorskip("fastapi", reason="the extra web is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path(os.environ.get("SIA_SCREENSHOTS", ROOT / "build" / "screenshots"))
HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'> "
    '" onfocus="window.ran = 1" autofocus x=" [click](javascript:window.ran=1) '
    "<svg onload=window.ran=1> <a href='javascript:window.ran=1'>click</a>"
)
VIEWS = {
    "runs": "/",
    "run": "/run/toy/one",
    "overview": "/candidate/g001-c0/toy/one",
    "diff": "/candidate/g001-c0/toy/one?view=diff",
    "harness": "/candidate/g001-c0/toy/one?view=harness",
    "prompt": "/candidate/g001-c0/toy/one?view=prompt",
    "trajectories": "/candidate/g001-c0/toy/one?view=trajectories",
    "trajectory": "/candidate/g001-c0/toy/one?view=trajectories&name=execution_qn00000.json",
    "calls": "/candidate/g001-c0/toy/one?view=calls",
    "logs": "/candidate/g001-c0/toy/one?view=logs",
    "update": "/candidate/g002-c0/toy/one?view=update",
    "compare": "/compare?run=toy/one&run=toy/two",
    "not-there": "/run/nothing",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "runs"
    make_run(folder / "toy" / "one", generations=12, trajectories=60, exam=True)
    make_run(folder / "toy" / "two", seed=1, exam=True)
    make_run(folder / "toy" / "hostile", seed=2, trajectories=2, said=HOSTILE, ended=False)
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """Of a server over `runs`."""
    command = [sys.executable, "-m", "sia.web", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"(http://\S+)/ ", process.stdout.readline())
        assert found is not None
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page; what its console complains about fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    assert complaints == []


def test_a_run_is_watched_while_generations_land(page: Page, runs: Path, address: str) -> None:
    run = runs / "live"
    process = subprocess.Popen(
        [sys.executable, "-m", "sia", "task=toy", "tracking=none", "generations=30",
         f"hydra.run.dir={run}"],
        cwd=runs.parent, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (run / rundir.JOURNAL_FILE).exists():
            assert process.poll() is None
            time.sleep(0.05)
        page.goto(f"{address}/run/live")
        page.evaluate("window.loadedOnce = true")
        rows = page.locator("table.generations tbody tr")
        expect(page.locator("h1 .badge")).to_have_text("running")
        counts = set()
        while process.poll() is None:
            counts.add(rows.count())
            time.sleep(0.1)
        assert process.returncode == 0
        expect(page.locator("h1 .badge")).to_have_text("finished")
        result = rundir.read_result(run)
        assert result is not None
        expect(rows).to_have_count(result.generations)
        assert len(counts) > 5, f"it did not grow step by step: {sorted(counts)}"
        assert page.evaluate("window.loadedOnce"), "the page was loaded anew"
        expect(page.locator("svg.chart").first.locator(".mark")).to_have_count(result.generations)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(run)


def test_the_list_is_filtered_without_a_reload(page: Page, address: str) -> None:
    page.goto(address)
    page.evaluate("window.loadedOnce = true")
    rows = page.locator("#runs tbody tr")
    expect(rows).to_have_count(3)
    page.get_by_label("status").select_option("killed")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("toy/hostile")
    assert "status=killed" in page.url
    page.get_by_label("status").select_option("")
    expect(rows).to_have_count(3)
    page.get_by_label("search").fill("two")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("toy/two")
    page.get_by_label("search").fill("nothing like it")
    expect(page.locator("#runs")).to_contain_text("None of 3 runs is like that")
    assert page.evaluate("window.loadedOnce")


def test_the_diff_shows_both_harnesses_side_by_side(page: Page, address: str) -> None:
    page.goto(f"{address}/run/toy/one")
    page.get_by_role("link", name="g001-c0").first.click()
    page.get_by_role("link", name="diff").click()
    changed = page.locator("table.diff tr.changed").first
    expect(changed.locator("td.old")).to_have_text("THRESHOLD = 0.5")
    expect(changed.locator("td.new")).to_have_text("THRESHOLD = 0.49")
    assert changed.locator("td.new span").count() > 1  # in colours
    expect(page.get_by_text("Unchanged: readme.md")).to_be_visible()


def test_trajectories_are_searched_and_read_as_a_conversation(page: Page, address: str) -> None:
    page.goto(f"{address}/candidate/g001-c0/toy/one?view=trajectories")
    status = page.locator("#found [role=status]")
    expect(status).to_have_text("60 of 60 trajectories")
    page.get_by_label("search in trajectories").press_sequentially("number 17")
    expect(status).to_have_text("1 of 60 trajectories")
    expect(page.locator("#found mark")).to_have_text("number 17")
    page.get_by_role("link", name="n00017").click()
    turns = page.locator("ol.talk li")
    expect(turns).to_have_count(3)
    expect(turns.nth(1).locator("mark")).to_have_text("number 17")
    expect(turns.nth(2)).to_contain_text("calls compare")


def test_chosen_runs_are_compared_with_paired_intervals(page: Page, address: str) -> None:
    page.goto(address)
    for key in ("toy/one", "toy/two"):
        page.get_by_label(f"compare {key}").check()
    with page.expect_response(lambda answer: "run=toy" in answer.url):
        pass  # the list is renewed; what was ticked stays so
    page.get_by_role("button", name="Compare the chosen runs").click()
    expect(page.locator("h1")).to_have_text("Comparison of 2 runs")
    expect(page.locator("svg.chart .line")).to_have_count(2)
    second = page.locator("tbody tr").nth(1)
    expect(second).to_contain_text("toy/one")
    assert re.search(r"[+-]0\.1000\s*[+-]0\.\d{4} to [+-]0\.\d{4}", second.inner_text())


def test_a_keyboard_is_enough(page: Page, address: str) -> None:
    page.goto(address)
    page.keyboard.press("Tab")
    expect(page.get_by_text("To the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "to-toy/one":
            break
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("toy: scripted improves embedded")


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "not-there"])
def test_nothing_that_a_model_wrote_is_run(page: Page, address: str, view: str) -> None:
    page.goto(address + VIEWS[view].replace("/one", "/hostile"))
    for handle in page.locator("main :is(a, pre, td, code)").all()[:20]:
        handle.hover(force=True)
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert (
        page.locator("main :is(script, img, iframe, object, embed, [onfocus], [onerror])").count()
        == 0
    )


# Colours depend on the scheme, layout on the width: two of the four pairs meet all of them.
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_view_is_readable_by_everyone(
    browser: Browser, address: str, scheme: str, width: int
) -> None:
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
    PICTURES.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults = {}
    for view, path in VIEWS.items():
        page.goto(address + path)
        page.screenshot(path=PICTURES / f"{view}-{scheme}-{width}.png", full_page=True)
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            faults[view] = ["wider than the window"]
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        if serious:
            faults[view] = [f"{one['id']}: {one['nodes'][0]['html']}" for one in serious]
    context.close()
    assert faults == {}, json.dumps(faults, indent=1)
