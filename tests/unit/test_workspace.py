from pathlib import Path

import pytest

from sia.errors import BadProposal
from sia.records import Candidate, Proposal
from sia.workspace import Workspaces, check_harness, diff, render

PROPOSAL = Proposal(
    hypothesis="Larger is better.",
    evidence="score = 0.5",
    expected_effect="+1 point",
    source="move:0",
    changes={"size": 3},
)


@pytest.fixture
def workspaces(tmp_path: Path) -> Workspaces:
    first = tmp_path / "first"
    first.mkdir()
    (first / "target_agent.py").write_text("print('hello')\n")
    (first / "__pycache__").mkdir()
    (first / "__pycache__" / "x.pyc").write_bytes(b"\0")
    return Workspaces(run=tmp_path / "run", first=first)


def candidate(generation: int) -> Candidate:
    return Candidate(
        id=f"g{generation:03}-c0", generation=generation, index=0, parent=None, proposal=PROPOSAL
    )


def test_an_edit_is_sealed_with_its_digest_its_diff_and_its_reasons(
    workspaces: Workspaces,
) -> None:
    folder = workspaces.open(0, 0, None)
    reference = workspaces.seal(folder, None, PROPOSAL)
    child = workspaces.open(1, 0, candidate(0))
    (child / "target_agent.py").write_text("print('bye')\n")
    digest = workspaces.seal(child, candidate(0), PROPOSAL)
    assert digest != reference
    assert not (child / "__pycache__").exists()
    text = (child.parent / "harness.diff").read_text()
    assert text == (
        "--- a/target_agent.py\n+++ b/target_agent.py\n"
        "@@ -1 +1 @@\n-print('hello')\n+print('bye')\n"
    )
    notes = (child.parent / "improvement.md").read_text()
    for part in ("Larger is better.", "score = 0.5", "+1 point", "`size`: 3", "g000-c0"):
        assert part in notes


def test_a_single_file_becomes_the_entry_point_of_a_harness(tmp_path: Path) -> None:
    file = tmp_path / "my_agent.py"
    file.write_text("print('hello')\n")
    workspaces = Workspaces(run=tmp_path / "run", first=file)
    folder = workspaces.open(0, 0, None)
    assert [path.name for path in folder.iterdir()] == ["target_agent.py"]
    (folder / "target_agent.py").write_text("print('bye')\n")
    workspaces.seal(folder, None, PROPOSAL)
    assert "-print('hello')\n+print('bye')\n" in (folder.parent / "harness.diff").read_text()
    assert file.read_text() == "print('hello')\n"


def test_an_unchanged_harness_has_the_same_digest(workspaces: Workspaces) -> None:
    first = workspaces.seal(workspaces.open(0, 0, None), None, PROPOSAL)
    assert workspaces.seal(workspaces.open(1, 0, candidate(0)), candidate(0), PROPOSAL) == first


def test_leftovers_of_a_killed_proposal_are_gone(workspaces: Workspaces) -> None:
    (workspaces.open(0, 0, None) / "half.py").write_text("")
    assert not (workspaces.open(0, 0, None) / "half.py").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file target_agent.py"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("def broken(:\n", "not valid Python"),
        ("x = 'a\x00b'\n", "not valid Python"),
    ],
)
def test_what_cannot_run_is_refused_before_it_costs_an_attempt(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "target_agent.py").write_text(text)
    with pytest.raises(BadProposal, match=message):
        check_harness(tmp_path)


def test_an_entry_point_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.py").write_text("print()\n")
    (tmp_path / "target_agent.py").symlink_to(tmp_path / "real.py")
    with pytest.raises(BadProposal, match="no file"):
        check_harness(tmp_path)


def test_a_diff_names_new_and_removed_files(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    (before / "old.py").write_text("a\n")
    (after / "new.py").write_bytes(b"\xff\n")
    text = diff(before, after)
    assert "-a\n" in text
    assert "+++ b/new.py" in text


def test_a_proposal_without_words_is_still_readable() -> None:
    assert "not stated" in render(Proposal(hypothesis="h"), None)
