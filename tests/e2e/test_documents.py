"""Every command that the README and the documents show is run, and every number has its command.

A block marked `bash` is run, line by line, in one folder per document. A block marked `console`
shows what needs a network, a server or a quarter of an hour; CI runs those of the README itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    lines = [line for block in BLOCK.findall(document.read_text()) for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(document: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands(document):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{document.name}: {command}\n{done.stdout}{done.stderr}"


def test_the_readmes_table_is_that_of_the_report() -> None:
    readme = (ROOT / "README.md").read_text()
    report = (ROOT / "reports" / "lawbench_embedded.md").read_text()
    rows = [line.split("|") for line in report.splitlines() if re.match(r"\| \S.*\| 0\.", line)]
    exam = [[cell.strip() for cell in row[1:6]] for row in rows[:4]]
    assert [name.split(" (")[0] for name, *_ in exam] == [
        "reference harness", "LinearSVC", "best by dev", "final refit",
    ]  # fmt: skip
    for _, dev, test, interval, _ in exam:
        low, high = interval.split(" to ")
        shown = f"{float(test):.3f}", f"{float(low):.3f} to {float(high):.3f}"
        assert any(all(part in line for part in shown) for line in readme.splitlines()), shown
        assert not dev or f"| {float(dev):.3f} |" in readme


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
