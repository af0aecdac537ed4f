"""What language-model harnesses make of a reply, and that they stay copies of one template."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sia.meta.knobs import load_space

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "src" / "sia" / "tasks" / "llm_harness"
HARNESSES = sorted(path.parent for path in (ROOT / "tasks").glob("*/harness_llm/model.py"))
LABELS = ["盗窃", "[贩卖、运输]毒品", "受贿, 轻", "True", "A"]


@pytest.fixture(scope="module")
def replies() -> Iterator[ModuleType]:
    for name in ("model", "replies"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(TEMPLATE))
    yield importlib.import_module("replies")
    sys.path.remove(str(TEMPLATE))
    for name in ("model", "replies"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda folder: folder.parent.name)
@pytest.mark.parametrize("name", ["model.py", "replies.py"])
def test_the_copies_in_the_tasks_are_those_of_the_template(harness: Path, name: str) -> None:
    assert (harness / name).read_bytes() == (TEMPLATE / name).read_bytes(), (
        f"cp {TEMPLATE / name} {harness}"
    )


@pytest.mark.parametrize("harness", [TEMPLATE, *HARNESSES], ids=lambda folder: folder.parent.name)
def test_the_embedded_optimiser_can_turn_their_knobs(harness: Path) -> None:
    assert load_space(harness).knobs


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 盗窃", "盗窃"),
        ("first\nanswer:B\nAnswer: A\n", "A"),
        ("**Final answer:** `A`.", "** `A`."),
        ("答案：盗窃", "盗窃"),
        ("- **答案**：盗窃。", "盗窃。"),
        ("The answer is A", ""),
        ("Not an Answer: A", ""),
        ("Answer:\nA", ""),
        ("", ""),
    ],
)
def test_only_the_last_answer_line_counts(replies: ModuleType, text: str, answer: str) -> None:
    assert replies.final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("盗窃", "盗窃"),
        (" **「盗窃」** 。", "盗窃"),
        ("【贩卖、运输】毒品", "[贩卖、运输]毒品"),
        ("贩卖,运输毒品", "[贩卖、运输]毒品"),
        ("［贩卖、运输］ 毒品", "[贩卖、运输]毒品"),
        ("受贿，轻", "受贿, 轻"),
        ("TRUE", "True"),
        ("(A)", "A"),
        ("Ａ", "A"),
        ("盗窃、受贿", ""),
        ("盗", ""),
        ("A or True", ""),
        ("ABC", ""),
        ("", ""),
        ("。", ""),
    ],
)
def test_a_spelling_of_one_label_is_that_label_and_nothing_else_is(
    replies: ModuleType, answer: str, label: str
) -> None:
    assert replies.exact_label(answer, LABELS) == label


def test_two_labels_that_are_spelt_alike_are_no_answer(replies: ModuleType) -> None:
    assert replies.exact_label("a", ["A", "[a]"]) == ""


@pytest.mark.parametrize("text", ["\n" * 10**6, "*" * 10**6, "Answer " * 10**5, "x" * 10**6])
def test_a_reply_without_end_is_read_without_trying_everything(
    replies: ModuleType, text: str
) -> None:
    began = time.perf_counter()
    assert replies.final_answer(text) == ""
    assert time.perf_counter() - began < 30  # a pattern that goes back takes hours


def test_trajectories_stay_within_what_the_sandbox_takes(
    replies: ModuleType, tmp_path: Path
) -> None:
    trajectories = replies.Trajectories(tmp_path, 4_000)
    prompt = [{"role": "user", "content": "问" * 10**5}]
    trajectories.write("a/b", [(prompt, replies.Reply(text="\0" * 10**5))], "none")
    path = tmp_path / "agent_execution" / "execution_qa_b.json"
    assert path.stat().st_size <= 48 * 2**20 / 4_000
    asked, said, verdict = json.loads(path.read_text(encoding="utf-8"))
    assert asked["content"].startswith("问问")
    assert "characters …" in said["content"]
    assert verdict == {"role": "tool", "content": "none"}


def test_a_failed_call_is_shown_as_one(replies: ModuleType, tmp_path: Path) -> None:
    trajectories = replies.Trajectories(tmp_path, 1)
    calls = [([], replies.Reply(error="HTTP 500")), ([], replies.Reply(text="and th", cut=True))]
    trajectories.write("x", calls, "none")
    text = (tmp_path / "agent_execution" / "execution_qx.json").read_text(encoding="utf-8")
    assert "(no reply: HTTP 500)" in text
    assert "and th (cut at max_tokens)" in text
