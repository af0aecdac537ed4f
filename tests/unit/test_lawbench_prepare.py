"""The data side of `lawbench`: split, sealed labels, scoring and the two controls."""

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

TASK = Path(__file__).parents[2] / "tasks" / "lawbench"
LABELS = ["盗窃", "[走私、贩卖、运输、制造]毒品", "放火", "受贿, 轻"]
FACTS = ["深夜入室窃取财物", "在车站交付毒品", "点燃仓库", "收受他人现金"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lawbench_{name}", TASK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_module, verify_module, controls = load("prepare"), load("verify"), load("controls")


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten cases for each label, one text twice, one test text that train has too."""
    folder = tmp_path_factory.mktemp("raw")
    train = [
        [str(10 * k + i), f"被告人第{i}次{fact}。", label]
        for k, (label, fact) in enumerate(zip(LABELS, FACTS, strict=True))
        for i in range(10)
    ]
    train.append(["40", train[0][1], LABELS[0]])
    tests = [
        [str(k), f"另案被告人{fact}。", label]
        for k, (label, fact) in enumerate(zip(LABELS, FACTS, strict=True))
    ]
    tests.append(["4", train[15][1], LABELS[1]])
    write_csv(folder / "train.csv", ["id", "text", "label"], train)
    write_csv(folder / "test_items.csv", ["id", "text"], [row[:2] for row in tests])
    write_csv(folder / "test_labels.csv", ["id", "label"], [[row[0], row[2]] for row in tests])
    (folder / "classes.json").write_text(json.dumps(LABELS, ensure_ascii=False), encoding="utf-8")
    return folder


def split(raw: Path, root: Path, seed: int = 0) -> tuple[Path, Path]:
    prepare_module.prepare(raw, root / "public", root / "private", seed=seed)
    return root / "public", root / "private"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    raw: Path, tmp_path: Path
) -> None:
    split(raw, tmp_path / "a")
    split(raw, tmp_path / "b")
    split(raw, tmp_path / "c", seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_public_side_holds_every_item_and_no_item_label(raw: Path, tmp_path: Path) -> None:
    public, private = split(raw, tmp_path)
    assert sorted(p.name for p in public.iterdir()) == [
        "items.csv",
        "labels.json",
        "task.md",
        "train.csv",
    ]
    items = read_csv(public / "items.csv")
    sealed = {
        s: {row["id"] for row in read_csv(private / s / "labels.csv")} for s in ("dev", "test")
    }
    assert list(items[0]) == ["id", "text"]
    assert {row["id"] for row in items} == sealed["dev"] | sealed["test"]
    assert not sealed["dev"] & sealed["test"]
    assert len(sealed["test"]) == 5


@pytest.mark.parametrize("seed", range(5))
def test_ids_are_opaque(raw: Path, tmp_path: Path, seed: int) -> None:
    public, _ = split(raw, tmp_path, seed)
    ids = [row["id"] for name in ("train.csv", "items.csv") for row in read_csv(public / name)]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 10 and int(i, 16) >= 0 for i in ids)
    assert not set(ids) & {str(k) for k in range(41)}


@pytest.mark.parametrize("seed", range(5))
def test_no_dev_text_has_a_twin(raw: Path, tmp_path: Path, seed: int) -> None:
    public, private = split(raw, tmp_path, seed)
    text = {row["id"]: row["text"] for row in read_csv(public / "items.csv")}
    train = {row["text"] for row in read_csv(public / "train.csv")}
    dev = [text[row["id"]] for row in read_csv(private / "dev" / "labels.csv")]
    test = {text[row["id"]] for row in read_csv(private / "test" / "labels.csv")}
    assert len(set(dev)) == len(dev)
    assert not set(dev) & (train | test)
    known = [row["in_train"] for row in read_csv(private / "test" / "labels.csv")]
    assert sorted(known) == ["0", "0", "0", "0", "1"]


def test_dev_is_stratified(raw: Path, tmp_path: Path) -> None:
    _, private = split(raw, tmp_path)
    answers = [row["label"] for row in read_csv(private / "dev" / "labels.csv")]
    assert [answers.count(label) for label in LABELS] == [4, 4, 5, 5]


def test_reveal_dev_moves_the_labels_and_keeps_the_items(raw: Path, tmp_path: Path) -> None:
    public, private = split(raw, tmp_path)
    prepare_module.reveal_dev(public, private / "dev", tmp_path / "revealed")
    before = {row["id"] for row in read_csv(public / "train.csv")}
    after = {row["id"]: row["label"] for row in read_csv(tmp_path / "revealed" / "train.csv")}
    dev = {row["id"]: row["label"] for row in read_csv(private / "dev" / "labels.csv")}
    assert after.keys() == before | dev.keys()
    assert dev.items() <= after.items()
    for name in ("items.csv", "labels.json", "task.md"):
        assert (tmp_path / "revealed" / name).read_bytes() == (public / name).read_bytes()


def test_contradicting_raw_files_are_refused(raw: Path, tmp_path: Path) -> None:
    for path in raw.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_csv(tmp_path / "test_labels.csv", ["id", "label"], [["0", LABELS[0]]])
    with pytest.raises(ValueError, match="different ids"):
        split(tmp_path, tmp_path / "out")


@pytest.fixture
def labels_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "labels"
    header = ["id", "label", "n_chars", "n_train", "in_train"]
    rows = [
        ["a", LABELS[0], "100", "20", "0"],
        ["b", LABELS[1], "900", "20", "0"],
        ["c", LABELS[2], "100", "4", "0"],
        ["d", LABELS[3], "100", "20", "1"],
    ]
    write_csv(folder / "labels.csv", header, rows)
    (folder / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")
    return folder


Answer = Callable[..., dict[str, Any]]


@pytest.fixture
def answer(tmp_path: Path, labels_dir: Path) -> Answer:
    def score(*rows: list[str], header: tuple[str, ...] = ("id", "label")) -> dict[str, Any]:
        write_csv(tmp_path / "sub" / "submission.csv", list(header), list(rows))
        result: dict[str, Any] = verify_module.verify(tmp_path / "sub", labels_dir)
        return result

    return score


ALL_RIGHT = [list(pair) for pair in zip("abcd", LABELS, strict=True)]


def test_all_right_scores_one(answer: Answer) -> None:
    result = answer(*ALL_RIGHT)
    assert result["score"] == 1.0
    assert result["items"] == dict.fromkeys("abcd", 1.0)
    assert result["n_answered"] == result["n_items"] == 4


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (ALL_RIGHT[:3], "n_missing"),
        ([*ALL_RIGHT[:3], ["d", ""]], "n_missing"),
        ([*ALL_RIGHT[:3], ["d"]], "n_missing"),
        ([*ALL_RIGHT, ["d", LABELS[0]]], "n_duplicated"),
        ([*ALL_RIGHT, ALL_RIGHT[3]], "n_duplicated"),
        ([*ALL_RIGHT[:3], ["d", "不存在"]], "n_unknown_label"),
    ],
)
def test_a_fault_costs_one_of_a_fixed_number_of_items(
    answer: Answer, rows: list[list[str]], count: str
) -> None:
    result = answer(*rows)
    assert result["score"] == 0.75
    assert result["n_items"] == 4
    assert result["n_answered"] == 3
    assert result["metrics"][count] == 1
    assert result["symptoms"]["abstained_share"] == 0.25
    assert result["items"]["d"] == 0.0


def test_many_rows_for_one_id_do_not_lift_the_score(answer: Answer) -> None:
    result = answer(*[["a", LABELS[0]] for _ in range(1000)])
    assert result["score"] == 0.0


def test_rows_of_the_other_split_are_ignored(answer: Answer) -> None:
    result = answer(*ALL_RIGHT, ["z", LABELS[0]], ["z", LABELS[1]])
    assert result["score"] == 1.0
    assert result["metrics"]["n_duplicated"] == 0


def test_alternatives_feed_top5_but_not_the_score(answer: Answer) -> None:
    rows = [
        ["a", LABELS[1], f"{LABELS[1]}|{LABELS[0]}"],
        ["b", LABELS[0], "x1|x2|x3|x4|" + LABELS[1]],
    ]
    result = answer(*rows, header=("id", "label", "alternatives"))
    assert result["score"] == 0.0
    assert result["metrics"]["top5"] == 0.25
    assert result["symptoms"]["in_top5_share"] == 0.25
    assert result["symptoms"]["confused_pair_share"] == 1.0


def test_metrics_and_breakdown_say_where_it_went_wrong(answer: Answer) -> None:
    result = answer(*ALL_RIGHT[:1], ["b", LABELS[0]], ["c", LABELS[0]], ALL_RIGHT[3])
    assert result["metrics"]["accuracy"] == 0.5
    assert result["metrics"]["accuracy_unseen_text"] == pytest.approx(1 / 3)
    assert result["symptoms"]["long_text_gap"] == pytest.approx(2 / 3)
    assert result["symptoms"]["rare_label_gap"] == pytest.approx(2 / 3)
    assert result["breakdown"]["recall"][LABELS[1]] == {"n": 1, "recall": 0.0}
    assert [LABELS[2], LABELS[0], 1] in result["breakdown"]["confusions"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,label\na,\xff\xfe\n", "not UTF-8"),
        (b"", "header"),
        (b"id,charge\na,x\n", "header"),
        (b"label,id\nx,a\n", "header"),
        (b"id,label\na," + b"x" * 200_000, "not a CSV"),
    ],
)
def test_an_unreadable_submission_is_a_one_line_error(
    tmp_path: Path, labels_dir: Path, content: bytes, message: str
) -> None:
    (tmp_path / "submission.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        verify_module.verify(tmp_path, labels_dir)
    assert "\n" not in str(caught.value)


def test_a_missing_or_linked_submission_is_refused(tmp_path: Path, labels_dir: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        verify_module.verify(tmp_path, labels_dir)
    (tmp_path / "submission.csv").symlink_to(labels_dir / "labels.csv")
    with pytest.raises(ValueError, match="plain file"):
        verify_module.verify(tmp_path, labels_dir)


def test_controls_hit_the_ends(raw: Path, tmp_path: Path) -> None:
    public, private = split(raw, tmp_path)
    for side, counts in (("dev", (4, 18)), ("test", (1, 5))):
        controls.oracle(private / side, tmp_path / "oracle")
        assert verify_module.verify(tmp_path / "oracle", private / side)["score"] == 1.0
        controls.null(public, tmp_path / "null")
        score = verify_module.verify(tmp_path / "null", private / side)["score"]
        assert score == counts[0] / counts[1]


def test_task_yaml_is_complete() -> None:
    task = yaml.safe_load((TASK / "task.yaml").read_text(encoding="utf-8"))
    assert task["name"] == TASK.name
    assert set(task["source"]["members"]) == {
        "train.csv",
        "classes.json",
        "test_items.csv",
        "test_labels.csv",
    }
    assert task["controls"]["oracle"] == task["metric"]["best"] == 1.0
    assert task["controls"]["null"].keys() == task["splits"].keys()
