"""The tools that the Pydantic AI driver gives to its agent."""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Coroutine
from pathlib import Path

import pytest

pytest.importorskip("pydantic_ai")

from sia.meta.drivers.pydantic_ai import OUTPUT, Workspace, deadline


@pytest.fixture
def tools(tmp_path: Path) -> Workspace:
    for folder in ("work", "data"):
        (tmp_path / folder).mkdir()
    return Workspace(work=tmp_path / "work", data=tmp_path / "data")


@pytest.fixture
def work(tools: Workspace, tmp_path: Path) -> Path:
    return tmp_path / "work"


def said(answer: Coroutine[object, object, str]) -> str:
    return asyncio.run(answer)


def test_file_is_read_by_lines_and_says_what_is_left(tools: Workspace, work: Path) -> None:
    (work / "a.txt").write_text("one\ntwo\nthree\nfour")
    assert said(tools.read_file("a.txt")) == "one\ntwo\nthree\nfour"
    assert said(tools.read_file("a.txt", 2, 2)) == "two\nthree\n[lines 2 to 3 of 4]"


def test_long_file_is_cut_and_says_where(tools: Workspace, work: Path) -> None:
    (work / "a.txt").write_text("0123456789\n" * 10_000)
    *lines, note = said(tools.read_file("a.txt")).splitlines()
    assert sum(len(line) + 1 for line in lines) <= OUTPUT + 1
    assert note == f"[cut after {OUTPUT} characters, in line {len(lines)} of 10001]"


def test_only_workspace_and_data_can_be_read_and_only_the_workspace_written(
    tools: Workspace, work: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "secret").write_text("s")
    (work / "link").symlink_to(tmp_path / "secret")
    (work / "data").symlink_to(tmp_path / "data")
    assert said(tools.read_file("data/b.txt")) == "b"
    for path in ("../secret", "link", str(tmp_path / "secret"), "/etc/passwd"):
        with pytest.raises(ValueError, match="lies outside of"):
            said(tools.read_file(path))
    for path in ("../x", "data/b.txt", "data/new", "link"):
        with pytest.raises(ValueError, match="lies outside of"):
            said(tools.write_file(path, "x"))
    assert (tmp_path / "secret").read_text() == "s"


def test_pipe_is_refused_instead_of_waited_for(tools: Workspace, work: Path) -> None:
    os.mkfifo(work / "pipe")
    with pytest.raises(ValueError, match="pipe is not a file"):
        said(tools.read_file("pipe"))


def test_passage_is_replaced_where_it_is_the_only_one(tools: Workspace, work: Path) -> None:
    said(tools.write_file("deep/a.py", "x = 1\r\ny = 1\r\n"))
    said(tools.edit_file("deep/a.py", "x = 1", "x = 2"))
    assert (work / "deep" / "a.py").read_bytes() == b"x = 2\r\ny = 1\r\n"
    with pytest.raises(ValueError, match="does not occur"):
        said(tools.edit_file("deep/a.py", "z", "x"))
    with pytest.raises(ValueError, match="occurs 2 times"):
        said(tools.edit_file("deep/a.py", " = ", "x"))


def test_files_are_listed_in_order_and_cut(tools: Workspace, work: Path) -> None:
    for number in (2, 1):
        (work / f"{number}.txt").write_text("x" * number)
    assert said(tools.list_files()) == "1.txt 1\n2.txt 2\n"
    for number in range(2_000):
        (work / f"{number:020}").touch()
    assert said(tools.list_files()).endswith(" lines; there are more]")


def test_search_finds_lines_of_text_files(tools: Workspace, work: Path) -> None:
    (work / "b.py").write_text("import a\nimport b\n")
    (work / "a.py").write_text("import a\n")
    (work / "c.bin").write_bytes(b"\xffimport a\n")
    assert said(tools.search(r"import [a]$")) == "a.py:1: import a\nb.py:1: import a\n"
    assert said(tools.search("import", "a.py")) == "a.py:1: import a\n"
    assert said(tools.search("nothing")) == "[none]"
    with pytest.raises(ValueError, match="not a regular expression"):
        said(tools.search("("))


def test_search_that_would_never_end_is_stopped() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.1 s"), deadline(0.1):
        re.search(r"(a+)+$", "a" * 60 + "!")
    with pytest.raises(TimeoutError), deadline(0.1):
        for _ in itertools.count():
            pass
    assert time.monotonic() - began < 30
