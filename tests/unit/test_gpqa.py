"""The task `gpqa`: split, scoring, controls, and both of its harnesses' parts, on made-up data."""

import importlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sia.tasks.tables import read_table, write_table

TASK = Path(__file__).parents[2] / "tasks" / "gpqa"
LETTERS = "ABCD"
DOMAINS = ["Chemistry"] * 93 + ["Physics"] * 86 + ["Biology"] * 19
OPTIONS = {"A": "3.2 eV", "B": "a", "C": "[Ni(CN)4]", "D": "None of them, or both"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpqa_{name}", TASK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_module, verify_module, controls = load("prepare"), load("verify"), load("controls")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """198 questions in the source's form; the right option is always the second letter."""
    folder = tmp_path_factory.mktemp("raw")
    questions = [
        {
            "id": k, "domain": domain, "subdomain": f"{domain} {k % 3}",
            "Question": f"Question {k},\nwith a second line?\n",
            "options": {letter: f"option {letter} of {k}" for letter in LETTERS},
            "correct_answer": f"option B of {k}", "correct_answer_letter": "B",
            "Explanation": f"Because of {k}.",
        }
        for k, domain in enumerate(DOMAINS)
    ]  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.fixture(scope="module")
def sides(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sides")
    prepare_module.prepare(raw, root / "public", root / "private", seed=0)
    return root


def labels(sides: Path, split: str) -> dict[str, str]:
    rows = read_table(sides / "private" / split / "labels.csv")
    return {row["id"]: row["label"] for row in rows}


def submit(folder: Path, rows: list[tuple[str, str]]) -> Path:
    table = [{"id": item, "answer": answer} for item, answer in rows]
    write_table(folder / "submission.csv", ["id", "answer"], table)
    return folder


def test_every_side_has_its_share_of_domains_and_of_letters(sides: Path) -> None:
    train = read_table(sides / "public" / "train.csv")
    items = {row["id"]: row for row in read_table(sides / "public" / "items.csv")}
    dev, test = labels(sides, "dev"), labels(sides, "test")
    assert (len(train), len(dev), len(test)) == (48, 75, 75)
    assert items.keys() == dev.keys() | test.keys()
    assert not dev.keys() & test.keys()
    assert Counter(row["label"] for row in train) == dict.fromkeys(LETTERS, 12)
    for side in (dev, test):
        assert Counter(side.values()) == {"A": 19, "B": 19, "C": 19, "D": 18}
        assert 35 <= sum(items[item]["domain"] == "Chemistry" for item in side) <= 36


def test_options_are_reordered_and_answers_stay_on_the_private_side(sides: Path) -> None:
    items = {row["id"]: row for row in read_table(sides / "public" / "items.csv")}
    for item, letter in labels(sides, "test").items():
        row = items[item]
        assert row[letter].startswith("option B of ")
        assert {row[name][7] for name in LETTERS} == set(LETTERS)
        assert list(row) == ["id", "domain", "subdomain", "question", *LETTERS]
    order = [[row[name][7] for name in LETTERS if row[name][7] != "B"] for row in items.values()]
    assert len({tuple(letters) for letters in order}) == 6
    public = "".join(path.read_text() for path in (sides / "public").iterdir())
    assert "Because of" not in public


def test_the_same_seed_makes_the_same_bytes_and_another_one_others(
    raw: Path, sides: Path, tmp_path: Path
) -> None:
    for seed, same in ((0, True), (1, False)):
        prepare_module.prepare(raw, tmp_path / "public", tmp_path / "private", seed=seed)
        again = (tmp_path / "public" / "items.csv").read_bytes()
        assert (again == (sides / "public" / "items.csv").read_bytes()) is same


def test_a_question_that_contradicts_its_answer_is_refused(tmp_path: Path, raw: Path) -> None:
    questions = json.loads((raw / "questions.json").read_text())
    questions[7]["correct_answer"] = "something else"
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="question 7 does not fit its own answer"):
        prepare_module.prepare(tmp_path, tmp_path / "public", tmp_path / "private", seed=0)


def test_revealed_dev_items_are_in_train_and_items_stay(sides: Path, tmp_path: Path) -> None:
    prepare_module.reveal_dev(sides / "public", sides / "private" / "dev", tmp_path)
    train = {row["id"]: row["label"] for row in read_table(tmp_path / "train.csv")}
    assert len(train) == 48 + 75
    assert labels(sides, "dev").items() <= train.items()
    assert not labels(sides, "test").keys() & train.keys()
    items = (sides / "public" / "items.csv").read_bytes()
    assert (tmp_path / "items.csv").read_bytes() == items


def test_the_controls_hit_the_ends(sides: Path, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        private = sides / "private" / split
        controls.oracle(private, tmp_path)
        assert verify_module.verify(tmp_path, private)["score"] == 1.0
        controls.null(sides / "public", tmp_path)
        assert verify_module.verify(tmp_path, private)["score"] == 19 / 75


@pytest.mark.parametrize(
    "answer", ["", "ABC", "a", "(B)", "I cannot tell", "Error: 429", "E", "B)"]
)
def test_only_one_capital_letter_is_an_answer(sides: Path, tmp_path: Path, answer: str) -> None:
    dev = labels(sides, "dev")
    first = next(iter(dev))
    rows = [(item, answer if item == first else letter) for item, letter in dev.items()]
    found = verify_module.verify(submit(tmp_path, rows), sides / "private" / "dev")
    assert found["score"] == 74 / 75
    assert (found["n_items"], found["n_answered"]) == (75, 74)
    assert found["metrics"]["answered_share"] == 74 / 75
    assert found["metrics"]["accuracy_answered"] == 1.0
    assert found["metrics"]["n_unreadable"] == float(bool(answer))
    assert found["metrics"]["n_missing"] == float(not answer)
    assert found["answers"][first] == answer


def test_leaving_out_and_repeating_do_not_pay(sides: Path, tmp_path: Path) -> None:
    dev = labels(sides, "dev")
    private = sides / "private" / "dev"
    first, second, *_ = dev
    found = verify_module.verify(submit(tmp_path, [(first, dev[first])]), private)
    assert found["score"] == 1 / 75
    assert found["symptoms"]["abstained_share"] == pytest.approx(74 / 75)
    rows = [(first, dev[first])] * 2 + [(second, dev[second])] + [("stranger", "A")]
    found = verify_module.verify(submit(tmp_path, rows), private)
    assert found["score"] == 1 / 75
    assert found["metrics"]["n_duplicated"] == 1.0
    assert found["answers"][first] == f"{dev[first]}|{dev[first]}"


def test_what_was_handed_in_is_shown_for_every_item_and_bounded(
    sides: Path, tmp_path: Path
) -> None:
    first, *_ = labels(sides, "dev")
    found = verify_module.verify(submit(tmp_path, [(first, "x" * 900)]), sides / "private" / "dev")
    assert found["answers"].keys() == found["items"].keys()
    assert found["answers"][first] == "x" * 200


def test_symptoms_tell_a_favourite_letter_and_a_weak_domain(sides: Path, tmp_path: Path) -> None:
    private = sides / "private" / "dev"
    rows = read_table(private / "labels.csv")
    answers = [(row["id"], row["label"] if row["domain"] == "Physics" else "C") for row in rows]
    found = verify_module.verify(submit(tmp_path, answers), private)
    assert found["metrics"]["accuracy_physics"] == 1.0
    assert found["symptoms"]["domain_gap"] > 0.5
    assert found["symptoms"]["letter_bias"] > 0.3
    assert found["breakdown"]["letters"]["C"]["right"] == 19
    controls.null(sides / "public", tmp_path)
    assert verify_module.verify(tmp_path, private)["symptoms"]["letter_bias"] == 0.75


@pytest.mark.parametrize("changes", [("", ""), ("use: false", "use: true")])
def test_the_embedded_harness_answers_every_item_twice_alike(
    sides: Path, tmp_path: Path, changes: tuple[str, str]
) -> None:
    for name in ("target_agent.py", "harness.yaml"):
        text = (TASK / "harness" / name).read_text()
        (tmp_path / name).write_text(text.replace(*changes) if changes[0] else text)
    submitted = []
    for k in range(2):
        work = tmp_path / f"work{k}"
        work.mkdir()
        subprocess.run(
            [sys.executable, str(tmp_path / "target_agent.py"), "--dataset_dir",
             str(sides / "public"), "--working_dir", str(work)],
            check=True, timeout=60,
        )  # fmt: skip
        submitted.append((work / "submission.csv").read_bytes())
        assert len(list((work / "agent_execution").iterdir())) == 10
    assert submitted[0] == submitted[1]
    assert verify_module.verify(work, sides / "private" / "dev")["n_answered"] == 75


@pytest.fixture(scope="module")
def letters() -> Iterator[ModuleType]:
    names = ("model", "replies", "letters")
    for name in names:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(TASK / "harness_llm"))
    yield importlib.import_module("letters")
    sys.path.remove(str(TASK / "harness_llm"))
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), (" **B** ", "B"), ("(C)", "C"), ("D.", "D"), ("$B$", "B"),
        ("A) 3.2 eV", "A"), ("C: [Ni(CN)4]", "C"), ("**A**. 3.2 eV.", "A"), ("3.2 eV", "A"),
        ("a", "B"), ("d", ""), ("A) 4.1 eV", ""), ("A) a", ""), ("ABC", ""), ("A or B", ""),
        ("A, B", ""), ("I cannot tell", ""), ("none", ""), ("Error", ""), ("", ""), ("E", ""),
        ("B is wrong", ""), ("\\boxed{B}", ""),
    ],
)  # fmt: skip
def test_a_letter_is_taken_only_where_it_is_meant(
    letters: ModuleType, text: str, letter: str
) -> None:
    assert letters.letter_of(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("C", "C"), ("So.\nAnswer: C", "C"), ("C because", ""), ("Answer: C\nAnswer: none", "")],
)
def test_a_reply_speaks_with_its_last_answer_line(
    letters: ModuleType, text: str, letter: str
) -> None:
    assert letters.spoken(letters.Reply(text=text), OPTIONS) == letter


def test_the_likeliest_letter_adds_up_its_spellings(letters: ModuleType) -> None:
    def said(tops: object) -> object:
        return letters.Reply(choice={"logprobs": {"content": [{"top_logprobs": tops}]}})

    def top(token: str, logprob: float) -> dict[str, object]:
        return {"token": token, "logprob": logprob}

    assert letters.likeliest(said([top("A", -1.0), top("B", -1.2), top(" B", -1.3)])) == "B"
    assert letters.likeliest(said([top("The", -0.1), top("C", -4.0)])) == "C"
    assert letters.likeliest(said([top("The", -0.1)])) == ""
    assert letters.likeliest(said([top("A", -1.0), top("B", -1.0)])) == ""
    assert letters.likeliest(said("nonsense")) == ""
    assert letters.likeliest(letters.Reply(choice={"logprobs": None})) == ""


def test_votes_are_counted_and_abstentions_are_none(letters: ModuleType) -> None:
    majority: Callable[[list[str]], str] = letters.majority
    assert majority(["A", "B", "B"]) == "B"
    assert majority(["B", "A", ""]) == "B"
    assert majority(["", "", "D"]) == "D"
    assert majority(["", ""]) == ""
