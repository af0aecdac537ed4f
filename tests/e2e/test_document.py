"""The file in which a run is handed over: its contents, that it runs nothing, who can read it."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from made_runs import make_run
from sia.pages.document import document
from sia.rundir import candidate_dir

HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'> "
    "</style></td></table><style>@import 'http://127.0.0.1:9/x.css'</style> "
    "[click](javascript:window.ran=1) <a href='javascript:window.ran=1'>click</a> \x1b[31mred"
)
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true })"


class Parsed(HTMLParser):
    """Headings, the ids of sections, and what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "h2":
            self.headings.append("")
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "h2":
            self.headings[-1] += data


def test_a_run_is_told_from_its_result_to_its_origin(tmp_path: Path) -> None:
    text = document(make_run(tmp_path / "run", exam=True))
    found = Parsed(text)
    assert found.headings == [
        "Score by generation", "Generations", "Sealed test", "Time and cost",
        "Breakdown of the best candidate on dev", "Every candidate", "What was run",
    ]  # fmt: skip
    assert [f"about-g{k:03}-c0" for k in range(4)] == [
        one for one in found.ids if one.startswith("about-")
    ]
    assert len(found.ids) == len(set(found.ids))
    assert "+0.1000 <small>+0.0200 to +0.1800</small>" in text
    assert "0.49" in text  # of the diff
    assert "gradient_norm by step" in text
    assert "configuration sha256" in text
    assert "levers:" in text


def test_a_run_without_an_exam_says_how_to_open_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ended=False)
    text = document(run)
    assert f"python -m sia.exam {run}" in text
    assert f"python -m sia resume={run}" in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", exam=True)
    assert document(run) == document(run)


def test_the_command_writes_a_run_that_was_not_examined(tmp_path: Path) -> None:
    run, file = make_run(tmp_path / "run"), tmp_path / "out" / "run.html"
    command = [sys.executable, "-m", "sia.report", str(run), "--html", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    assert file.read_text() == document(run)


@pytest.mark.parametrize("names", [["nothing"], ["run", "run"]])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, names: list[str]) -> None:
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "sia.report", *names, "--html", "x.html"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sia: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_a_large_run_stays_under_two_megabytes_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", generations=30)
    for index in range(30):
        code = "".join(f"value_{index}_{k} = {'x' * 300!r}\n" for k in range(300))
        (candidate_dir(run, index, 0) / "harness" / "target_agent.py").write_text(code)
    text = document(run)
    assert 1_000_000 < len(text.encode()) < 2_000_000
    assert "Its diff is left out" in text
    assert "rows of this diff are left out" in text
    assert "value_29_0" in text  # the latest ones are kept
    assert "value_1_0" not in text


def test_links_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("the-secret")
    run = make_run(tmp_path / "run")
    harness = candidate_dir(run, 1, 0) / "harness"
    (harness / "linked.py").symlink_to(tmp_path / "secret.txt")
    (harness / "away").symlink_to(tmp_path)
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "secret.txt")
    assert "the-secret" not in document(run)


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", said=HOSTILE, exam=True)
    (candidate_dir(run, 1, 0) / "harness" / "<img src=x onerror=alert(1)>.py").write_text("x = 1")
    text = document(run)
    found = Parsed(text)
    assert found.tags.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "base"})
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    leading = [value for name, value in found.attributes if name in ("href", "src")]
    assert {value for value in leading if not value.startswith("#")} == {"data:,"}
    assert {value.removeprefix("#") for value in leading} - {"data:,"} <= set(found.ids)
    assert text.count("<style>") == text.count("</style>") == 1
    assert "\x1b" not in text
    assert "&lt;script&gt;window.ran = 1&lt;/script&gt;" in text


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
@pytest.mark.parametrize("said", ["A lower threshold.", HOSTILE], ids=["plain", "hostile"])
def test_it_opens_offline_runs_nothing_asks_for_nothing_and_can_be_read(
    browser: Any,
    tmp_path: Path,
    scheme: str,
    width: int,
    said: str,
) -> None:
    run = make_run(tmp_path / "run", said=said, exam=True)
    file = tmp_path / "run.html"
    file.write_text(document(run))
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.evaluate(OPEN_ALL)
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert page.locator("svg.chart").count() >= 3
    # The page's own policy forbids scripts, axe-core's too: it is read in a copy without a policy.
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", file.read_text())
    page.set_content(bare)
    page.evaluate(OPEN_ALL)
    page.evaluate(
        resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
    )
    faults = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [one for one in faults if one["impact"] in ("serious", "critical")]
    context.close()
    assert serious == [], json.dumps(serious, indent=1)[:3000]
