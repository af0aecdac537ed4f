"""Pages and tables for MLflow, from what models and verifiers wrote."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sia.records import Evaluation, Failure
from sia.tracking.artifacts import MAX_LINE, diff_page, tables
from sia.workspace import diff


class Page(HTMLParser):
    """The elements of a page, and the cells of its rows as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "td":
            self.rows[-1][-1] += data
        if self._in == "h2":
            self.titles[-1] += data


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    return before, after


def page_of(before: Path, after: Path) -> Page:
    return Page(diff_page(diff(before, after), "g001-c0"))


def test_old_and_new_lines_stand_side_by_side(folders: tuple[Path, Path]) -> None:
    before, after = folders
    (before / "a.py").write_text("one\ntwo\nthree\n")
    (after / "a.py").write_text("one\n2\n2b\nthree\n")
    page = page_of(before, after)
    assert page.titles == ["a.py"]
    assert page.rows == [
        ["", "@@ -1,3 +1,4 @@"],
        ["1", "one", "1", "one"],
        ["2", "two", "2", "2"],
        ["", "", "3", "2b"],
        ["3", "three", "4", "three"],
    ]


def test_files_without_a_last_line_end_and_new_files_are_told_apart(
    folders: tuple[Path, Path],
) -> None:
    before, after = folders
    (before / "a.py").write_text("old")
    (after / "a.py").write_text("new")
    (after / "b.py").write_text("--- a/trap\n+++ b/trap\n@@ -1 +1 @@")
    page = page_of(before, after)
    assert page.titles == ["a.py", "b.py"]
    assert page.rows[1] == ["1", "old", "1", "new"]
    assert [row[-1] for row in page.rows[3:]] == ["--- a/trap", "+++ b/trap", "@@ -1 +1 @@"]


def test_code_of_a_model_is_text_in_the_page(folders: tuple[Path, Path]) -> None:
    before, after = folders
    name = "<img src=x onerror=alert(1)>.py"
    hostile = "</td></table><script>alert(1)</script><a href='javascript:alert(1)'>x</a>&amp;"
    (after / name).write_text(f"{hostile}\n{'x' * 10_000}\n")
    page = page_of(before, after)
    assert page.titles == [name]
    assert page.rows[1][-1] == hostile
    assert len(page.rows[2][-1]) == MAX_LINE
    assert not page.elements & {"script", "img", "a", "iframe", "link", "base", "form"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.attributes.isdisjoint({"src", "href", "style"})


@pytest.mark.parametrize(
    "text", ["", "@@ -1 +1 @@\n-a\n+b\n", "--- a\n", "no diff at all\n@@\n", "+x\n-y\n" * 3]
)
def test_any_text_gives_a_page(text: str) -> None:
    assert diff_page(text, "t").endswith("</body></html>\n")


@pytest.mark.parametrize(
    ("part", "columns", "rows"),
    [
        ({"a": 0.5}, ["name", "value"], [["a", 0.5]]),
        ({"a": {"n": 1, "r": 0.5}, "b": {"n": 2}}, ["name", "n", "r"],
         [["a", 1, 0.5], ["b", 2, None]]),
        ([["x", "y", 3], ["z"]], ["row", "1", "2", "3"],
         [[1, "x", "y", 3], [2, "z", None, None]]),
        ([0.1, 0.2], ["row", "1"], [[1, 0.1], [2, 0.2]]),
        ({"a": [1, 2]}, ["name", "value"], [["a", "[1,2]"]]),
        ("text", ["value"], [["text"]]),
    ],
)  # fmt: skip
def test_a_breakdown_of_any_shape_is_a_table(
    part: object, columns: list[str], rows: list[list[object]]
) -> None:
    evaluation = Evaluation(candidate="c", split="dev", score=0.5, breakdown={"../by class": part})
    ((name, data),) = tables(evaluation).items()
    assert name == "dev/_by class.json"
    assert json.loads(data) == {"columns": columns, "data": rows}


def test_failures_are_a_table_of_what_was_said() -> None:
    failures = (Failure(item="i1", answer="<b>", score=0.0),)
    evaluation = Evaluation(candidate="c", split="dev", score=0.5, failures=failures)
    assert json.loads(tables(evaluation)["dev/failures.json"]) == {
        "columns": ["item", "answer", "score"],
        "data": [["i1", "<b>", 0.0]],
    }
