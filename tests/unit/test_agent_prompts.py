"""What agents are told, word for word. To take over a change: UPDATE_GOLDEN=1 pytest ..."""

import json
import os
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from sia.feedback import Shown
from sia.meta.material import MAX_ROWS, feedback_files, history_table, standing
from sia.meta.prompts import render
from sia.records import Candidate, Decision, Failure, Lever, Outcome, Proposal
from sia.tasks.task import Metric

GOLDEN = Path(__file__).with_name("golden")
ACCURACY = Metric(name="accuracy")
FACTS = {"metric": ACCURACY, "n_dev": 200}
PAST = [
    ("history.md", "all candidates so far, their scores and hypotheses"),
    ("feedback/scores.json", "the evaluation of the parent and of what came last"),
]
CONTRACT = {
    "files": ["`submission.csv`"],
    "max_mib": 1.0,
    "attempt_s": 180.0,
    "memory_mib": 4096,
    "processes": 256,
    "file_mib": 512,
    "disk_mib": 1024,
    "threads": 2,
}
DECISION = Decision(
    lever=Lever.HARNESS,
    hypothesis="Long texts are cut in the middle.",
    evidence="long_text_gap = 0.12",
    expected_effect="+1 point, on long texts",
)
PROMPTS = {
    "system": ("system", {}),
    "meta": (
        "meta",
        {**FACTS, **CONTRACT, "shown": [], "target_model": False,
         "harness_is": "the harness that the run starts from, to be edited"},
    ),
    "feedback_with_a_model": (
        "feedback",
        {**FACTS, **CONTRACT, "shown": PAST, "target_model": True, "generation": 3,
         "decision": DECISION, "siblings": ["Retrieve more examples."],
         "standing": "The best so far is g001-c0, accuracy 0.8113 on dev.",
         "harness_is": "the harness of g001-c0, to be edited"},
    ),
    "decision": (
        "decision",
        {**FACTS, "shown": PAST, "generation": 2, "levers": ["harness", "stop"],
         "standing": "The best so far is g001-c0, accuracy 0.8113 on dev.",
         "harness_is": "the harness of g001-c0, to be read"},
    ),
    "retry": ("retry", {"problems": ["harness/ is what it was before"], "prompt": "# A request\n"}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_prompt_reads_as_agreed(name: str) -> None:
    template, values = PROMPTS[name]
    text = render(template, **values)
    path = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_prompt_for_a_harness_holds_the_whole_contract() -> None:
    template, values = PROMPTS["feedback_with_a_model"]
    contract = render("contract", **values)
    assert contract in render(template, **values)
    first, values = PROMPTS["meta"]
    assert render("contract", **values) in render(first, **values)
    for model in (True, False):
        text = render("contract", **{**values, "target_model": model})
        assert ("`OPENAI_BASE_URL`" in text, "`SIA_MODEL`" in text) == (model, model)


def test_every_template_is_used_by_a_golden_prompt() -> None:
    folder = Path(__file__).resolve().parents[2] / "src/sia/meta/prompts"
    used = {template for template, _ in PROMPTS.values()}
    for name in used.copy():
        text = (folder / f"{name}.md.j2").read_text()
        used |= {part.split(".")[0] for part in text.split('include "')[1:]}
    assert {path.name.split(".")[0] for path in folder.glob("*.j2")} == used


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'prompt' is undefined"):
        render("retry", problems=[])


def test_what_others_wrote_is_not_taken_for_a_template() -> None:
    assert "{{ 7 * 7 }}" in render("retry", problems=["{{ 7 * 7 }}"], prompt="")


def shown(generation: int, score: float | None = 0.5, **other: object) -> Shown:
    proposal = other.pop("proposal", Proposal(hypothesis="An idea.", changes={"a.py": "+1 -1"}))
    candidate = Candidate(
        id=f"g{generation:03}-c0",
        generation=generation,
        index=0,
        parent=f"g{generation - 1:03}-c0" if generation else None,
        proposal=proposal,  # type: ignore[arg-type]
    )
    known = {"outcome": Outcome.OK, "reason": ""}
    return Shown(candidate=candidate, score=score, **{**known, **other})  # type: ignore[arg-type]


def test_history_tells_what_was_tried_and_what_it_brought(tmp_path: Path) -> None:
    crashed = shown(
        1, None, outcome=Outcome.CRASHED, reason=f"exit code 1 in\n{tmp_path}/gen-001 | x"
    )
    text = history_table([shown(0, 0.5), crashed, shown(2, 0.75)], ACCURACY, tmp_path)
    rows = text.splitlines()[-3:]
    assert rows == [
        "| g000-c0 |  | 0.5000 |  | ok | An idea. | a.py +1 -1 |",
        "| g001-c0 | g000-c0 |  |  | crashed: exit code 1 in <run>/gen-001 \\| x | An idea. "
        "| a.py +1 -1 |",
        "| g002-c0 | g001-c0 | 0.7500 |  | ok | An idea. | a.py +1 -1 |",
    ]
    loss = Metric(name="loss", direction="minimize", best=0.0, floor=1.0)
    text = history_table([shown(0, 0.5), shown(1, 0.25)], loss, tmp_path)
    assert "| +0.2500 |" in text
    assert "lower is better" in text


def test_a_long_history_keeps_the_best_and_the_latest(tmp_path: Path) -> None:
    past = [shown(i, 0.9 if i == 3 else 0.1, proposal=Proposal(hypothesis="x" * 9_000))
            for i in range(200)]  # fmt: skip
    text = history_table(past, ACCURACY, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| g")]
    assert len(rows) == MAX_ROWS
    assert rows[0].startswith("| g000-c0") or rows[0].startswith("| g003-c0")
    assert any(row.startswith("| g003-c0") for row in rows)
    assert rows[-1].startswith("| g199-c0")
    assert "170 earlier candidates are left out" in text
    assert len(text) < 20_000


def test_the_standing_names_the_best_the_parent_and_the_latest(tmp_path: Path) -> None:
    past = [shown(0, 0.5), shown(1, 0.7), shown(2, None, outcome=Outcome.TIMEOUT, reason="slow")]
    assert standing(past, past[1].candidate, ACCURACY, tmp_path) == (
        "The best so far is g001-c0, accuracy 0.7000 on dev. The next harness is made from "
        "g001-c0. The latest is g002-c0: timeout (slow), no score."
    )
    assert standing([], None, ACCURACY, tmp_path) == "No candidate has been scored yet."


def left(run: Path, generation: int, name: str, text: str) -> None:
    path = run / f"gen-{generation:03}" / "cand-0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_failures_and_traces_only_aggregates_are_given(tmp_path: Path) -> None:
    left(tmp_path, 0, "agent_execution/execution_q1.json", "[]")
    parent = shown(0, metrics={"top5": 0.9})
    files = feedback_files([parent], parent.candidate, tmp_path)
    assert list(files) == ["scores.json"]
    scores = json.loads(files["scores.json"])
    assert scores["parent"]["metrics"] == {"top5": 0.9}
    assert scores["latest"] == []


def test_trajectories_are_those_of_the_sample(tmp_path: Path) -> None:
    for item in ("1", "2", "3", "test-7"):
        left(tmp_path, 0, f"agent_execution/execution_q{item}.json", item)
    sample = tuple(Failure(item=item, answer="a", score=0.0) for item in ("9", "3", "1"))
    parent = shown(0, failures=sample, traces=5)
    files = feedback_files([parent], parent.candidate, tmp_path)
    assert [name for name in files if name.startswith("traj")] == [
        "trajectories/execution_q3.json", "trajectories/execution_q1.json",
    ]  # fmt: skip
    one = shown(0, failures=sample, traces=1)
    files = feedback_files([one], one.candidate, tmp_path)
    assert [name for name in files if name.startswith("traj")] == ["trajectories/execution_q3.json"]


def test_where_names_are_no_ids_the_first_few_trajectories_are_taken(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        left(tmp_path, 0, f"agent_execution/execution_q{number}.json", "x" * 90_000)
    left(tmp_path, 0, "agent_execution/agent_execution.json", "whole")
    parent = shown(0, traces=3, failures=(Failure(item="case-5", answer="", score=0.0),))
    files = feedback_files([parent], parent.candidate, tmp_path)
    names = [name for name in files if name.startswith("traj")]
    assert names == [
        "trajectories/agent_execution.json", "trajectories/execution_q0.json",
        "trajectories/execution_q1.json",
    ]  # fmt: skip
    assert files[names[1]].decode().endswith("… 40000 more characters\n")
    assert "(no usable answer)" in files["failures.md"].decode()


def test_a_duplicate_is_shown_with_what_its_twin_left(tmp_path: Path) -> None:
    left(tmp_path, 0, "agent_execution/execution_q0.json", "[]")
    twin = shown(1, outcome=Outcome.DUPLICATE, traces=1)
    object.__setattr__(twin.candidate, "duplicate_of", "g000-c0")
    files = feedback_files([shown(0), twin], twin.candidate, tmp_path)
    assert "trajectories/execution_q0.json" in files


def test_the_last_words_of_what_failed_are_given(tmp_path: Path) -> None:
    left(tmp_path, 0, "stderr.log", "a warning")
    left(tmp_path, 1, "stderr.log", "x" * 9_000 + f"\nError in {tmp_path}/gen-001\n")
    parent, failed = shown(0), shown(1, None, outcome=Outcome.CRASHED, reason="exit code 1")
    files = feedback_files([parent, failed], parent.candidate, tmp_path)
    assert sorted(files) == ["g001-c0-stderr.txt", "scores.json"]
    text = files["g001-c0-stderr.txt"].decode()
    assert text.endswith("Error in <run>/gen-001\n")
    assert len(text) <= 4_000
    assert json.loads(files["scores.json"])["latest"][0]["outcome"] == "crashed"
