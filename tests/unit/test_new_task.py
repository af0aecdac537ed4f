"""New task folders: whatever the table, their free tests pass, and their verifiers count all."""

import csv
import random
from pathlib import Path

import pytest

from sia.errors import TaskError
from sia.meta.knobs import load_space
from sia.provenance import tree_sha256
from sia.tasks import Task, checks, data
from sia.tasks.data import task_module
from sia.tasks.new import create, main
from sia.tasks.tables import read_table, write_table


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def flats(tmp_path: Path) -> Path:
    """A table whose labels, rents, occur in other columns, too."""
    rng = random.Random(0)
    rows = [(f"f{k}", rooms := rng.randrange(1, 6), k % 7, rooms * 100 + k) for k in range(80)]
    rows[0] = ("f0", 1, 5, 5)
    return write_csv(tmp_path / "flats.csv", ("flat", "rooms", "floor", "rent"), rows)


@pytest.fixture
def coins(tmp_path: Path) -> Path:
    """A table of zeros and ones."""
    rng = random.Random(0)
    rows = [(*(rng.randrange(2) for _ in range(4)), k % 3) for k in range(120)]
    return write_csv(tmp_path / "coins.csv", ("a", "b", "c", "d", "heads"), rows)


def faults(task: Task) -> list[str]:
    return [*checks.controls(task), *checks.leaks(task)]


def test_a_task_without_a_table_passes_its_free_tests(tmp_path: Path) -> None:
    task = create("plants", out=tmp_path / "tasks")
    assert faults(task) == []
    assert task.facts.splits == {"dev": 150, "test": 150}
    assert load_space(task.reference_harness).moves
    again = create("plants", out=tmp_path / "again")
    assert tree_sha256(again.root) == tree_sha256(task.root)


def test_labels_that_are_many_numbers_are_scored_by_their_distance(
    flats: Path, tmp_path: Path
) -> None:
    task = create("flats", out=tmp_path / "tasks", table=flats, label="rent", id="flat")
    assert (task.metric.name, task.metric.direction) == ("rmse", "minimize")
    assert faults(task) == []
    assert "flat" not in read_table(task.public_dir / "items.csv")[0]
    assert task.facts.controls["oracle"] == {"dev": 0.0, "test": 0.0}
    # Without sentences nothing is said about them.
    space = load_space(task.reference_harness)
    assert not any(name.startswith("text") for name in space.knobs)
    assert len(space.moves) == 2


def test_labels_that_other_columns_hold_too_are_told_apart(coins: Path, tmp_path: Path) -> None:
    task = create("coins", out=tmp_path / "tasks", table=coins, label="heads")
    assert task.metric.name == "accuracy"
    assert faults(task) == []
    labels = {row["heads"] for row in read_table(task.public_dir / "train.csv")}
    assert labels <= {"heads=0", "heads=1", "heads=2"}
    items = read_table(task.public_dir / "items.csv")
    answers = {
        row["id"]: row["label"] for row in read_table(task.labels_dir("test") / "labels.csv")
    }
    for row in items:
        if row["id"] in answers:
            row["heads"] = answers[row["id"]]
    write_table(task.public_dir / "hint.csv", [*items[0], "heads"], items)
    assert any("beside its private label" in fault for fault in checks.leaks(task))


def test_rows_that_are_equal_lie_on_one_side(coins: Path, tmp_path: Path) -> None:
    task = create("coins", out=tmp_path / "tasks", table=coins, label="heads")
    train = read_table(task.public_dir / "train.csv")
    items = read_table(task.public_dir / "items.csv")
    assert len(train) + len(items) == 120
    features = [{tuple(row[name] for name in "abcd") for row in rows} for rows in (train, items)]
    assert not features[0] & features[1]


def test_another_seed_makes_another_split(flats: Path, tmp_path: Path) -> None:
    task = create("flats", out=tmp_path / "tasks", table=flats, label="rent")
    before = tree_sha256(task.root / "data")
    data.split(task, seed=1)
    assert tree_sha256(task.root / "data") != before
    data.split(task, seed=0)
    assert tree_sha256(task.root / "data") == before


def test_no_answer_costs_the_whole_range_of_the_labels(flats: Path, tmp_path: Path) -> None:
    task = create(
        "flats", out=tmp_path / "tasks", table=flats, label="rent", id="flat", metric="mae"
    )
    labels = task.labels_dir("dev")
    truth = {row["id"]: float(row["label"]) for row in read_table(labels / "labels.csv")}
    _, second, third, fourth, *rest = truth
    span = max(truth.values()) - min(truth.values())
    rows = [(item, truth[item]) for item in rest]
    rows += [(second, "nan"), (third, truth[third]), (third, truth[third]), (fourth, "1e999")]
    submission = tmp_path / "submission"
    submission.mkdir()
    write_csv(submission / "submission.csv", ("id", "rent"), rows)
    found = task_module(task, "verify").verify(submission, labels)
    assert found["score"] == pytest.approx(4 * span / len(truth))
    assert found["n_answered"] == len(truth) - 4
    assert sum(found["items"].values()) / len(truth) == pytest.approx(found["score"])


def test_dev_labels_are_added_for_the_refit(flats: Path, tmp_path: Path) -> None:
    task = create("flats", out=tmp_path / "tasks", table=flats, label="rent", id="flat")
    out = tmp_path / "revealed"
    task_module(task, "prepare").reveal_dev(task.public_dir, task.labels_dir("dev"), out)
    before, after = read_table(task.public_dir / "train.csv"), read_table(out / "train.csv")
    assert len(after) == len(before) + task.facts.splits["dev"]
    assert all(float(row["rent"]) for row in after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My Task"}, "'My Task' is no name"),
        ({"label": None}, "--label COLUMN, one of: "),
        ({"label": "size"}, "--label 'size' is no column"),
        ({"id": "size"}, "--id 'size' is no column"),
        ({"label": "flat"}, "names the rows"),
        ({"metric": "rmse", "label": "flat", "id": None}, "--metric rmse needs numbers"),
        ({"table": None}, "give it with --from"),
    ],
)
def test_a_wrong_name_or_column_is_refused_and_nothing_is_written(
    flats: Path, tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    wanted = {"name": "flats", "table": flats, "label": "rent", "id": "flat", **change}
    with pytest.raises(TaskError, match=message):
        create(wanted.pop("name"), out=tmp_path / "tasks", **wanted)
    assert not list((tmp_path / "tasks").glob("*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,y\n" + b"1,2\n" * 30, "has 30 rows with a 'y'; 40 are needed"),
        (b"a,y\n" + b"1,2\n" * 60, "there is nothing to say"),
        (b"a,y\n" + b"1,2\n" * 60 + b"1\n", "row 62: not as many cells"),
        (b"a,y\n" + b"1,\xe9\n" * 60, "cannot be read as a CSV file in UTF-8"),
        (b"a,y\n" + b"1,2\n1,3\n" * 60, "no row is left for train"),
        (b"a,y\n", "no row at all"),
    ],
)
def test_a_table_that_cannot_be_split_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(TaskError, match=message):
        create("mine", out=tmp_path / "tasks", table=tmp_path / "t.csv", label="y")
    assert not (tmp_path / "tasks" / "mine").exists()


def test_the_command_says_what_comes_next(
    flats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["flats", "--from", str(flats), "--label", "rent", "--id", "flat"]
    assert main(command) == 0
    assert "python -m sia task=folder task.dir=tasks/flats" in capsys.readouterr().out
    assert main(command) == 2
    assert "tasks/flats exists already" in capsys.readouterr().err
