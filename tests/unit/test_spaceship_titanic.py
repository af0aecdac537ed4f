"""`spaceship-titanic`: split, verifier and harness on a made-up passenger list."""

import copy
import csv
import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from sia.tasks import load_task
from sia.tasks.data import task_module

TASK = Path(__file__).parents[2] / "tasks" / "spaceship-titanic"
HARNESS = TASK / "harness"
MODULES = tuple(path.stem for path in HARNESS.glob("*.py"))
CONFIG = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
SPENDING = ["RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]
COLUMNS = ["PassengerId", "HomePlanet", "CryoSleep", "Cabin", "Destination", "Age", "VIP"]
COLUMNS += [*SPENDING, "Name", "Transported"]


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The harness's modules by name; sys.path and sys.modules are put back afterwards."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(HARNESS))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(HARNESS))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def made_up_passengers(n_groups: int, rng: random.Random) -> list[dict[str, str]]:
    passengers = []
    for group in range(n_groups):
        planet, side = rng.choice(["Earth", "Europa", "Mars"]), rng.choice("PS")
        for place in range(rng.choice([1, 1, 1, 2, 3])):
            asleep = rng.random() < 0.4
            row = {
                "PassengerId": f"{group:04}_{place + 1:02}",
                "HomePlanet": planet,
                "CryoSleep": str(asleep),
                "Cabin": f"{'B' if planet == 'Europa' else 'F'}/{group}/{side}",
                "Destination": rng.choice(["TRAPPIST-1e", "55 Cancri e"]),
                "Age": f"{rng.randint(0, 70)}.0",
                "VIP": "False",
                "Name": f"Ann Kin{group}",
                "Transported": str(asleep if rng.random() < 0.9 else not asleep),
            }
            row |= {name: "0.0" if asleep else f"{rng.randint(0, 900)}.0" for name in SPENDING}
            for name in ("HomePlanet", "CryoSleep", "Cabin", "Age", "Name", "Spa"):
                if rng.random() < 0.05:
                    row[name] = ""
            passengers.append(row)
    return passengers


def write(path: Path, passengers: list[dict[str, str]], columns: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(passengers)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def prepared(folder: Path, seed: int) -> Path:
    rng = random.Random(5)
    passengers = made_up_passengers(220, rng)
    rng.shuffle(passengers)
    test, train = passengers[:60], passengers[60:]
    write(folder / "raw" / "train.csv", train, COLUMNS)
    write(folder / "raw" / "test_items.csv", test, COLUMNS[:-1])
    write(folder / "raw" / "test_labels.csv", test, COLUMNS)
    prepare = task_module(load_task(TASK), "prepare")
    prepare.prepare(folder / "raw", folder / "public", folder / "private", seed=seed)
    prepare.reveal_dev(folder / "public", folder / "private" / "dev", folder / "revealed")
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("ship"), 0)


def group(name: str) -> str:
    return name.split("_")[0]


def test_no_group_straddles_train_and_dev(split: Path) -> None:
    train = {group(row["PassengerId"]) for row in rows(split / "public" / "train.csv")}
    dev = {group(row["id"]) for row in rows(split / "private" / "dev" / "labels.csv")}
    assert dev
    assert not train & dev


def test_the_answers_of_dev_are_as_frequent_for_every_seed(split: Path, tmp_path: Path) -> None:
    def answers(folder: Path) -> list[str]:
        return sorted(row["label"] for row in rows(folder / "private" / "dev" / "labels.csv"))

    other = prepared(tmp_path, 1)
    assert answers(other) == answers(split)
    assert (other / "public" / "items.csv").read_bytes() != (
        split / "public" / "items.csv"
    ).read_bytes()


def test_items_hold_dev_and_test_without_answers(split: Path) -> None:
    items = rows(split / "public" / "items.csv")
    sides = [rows(split / "private" / side / "labels.csv") for side in ("dev", "test")]
    assert {row["PassengerId"] for row in items} == {row["id"] for side in sides for row in side}
    assert list(items[0]) == COLUMNS[:-1]
    known = {row["PassengerId"] for row in rows(split / "public" / "train.csv")}
    for row in sides[1]:
        assert row["group_in_train"] == str(int(group(row["id"]) in {group(i) for i in known}))


def test_revealed_dev_items_are_in_train_and_stay_items(split: Path) -> None:
    train = rows(split / "revealed" / "train.csv")
    n_dev = len(rows(split / "private" / "dev" / "labels.csv"))
    assert len(train) == len(rows(split / "public" / "train.csv")) + n_dev
    assert {row["Transported"] for row in train} == {"yes", "no"}
    assert (split / "revealed" / "items.csv").read_bytes() == (
        split / "public" / "items.csv"
    ).read_bytes()


def test_labels_that_do_not_fit_the_items_are_refused(split: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (split / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes())
    lines = (raw / "test_labels.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (raw / "test_labels.csv").write_text("".join([lines[0], *lines[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="differ; fetch them again"):
        task_module(load_task(TASK), "prepare").prepare(
            raw, tmp_path / "public", tmp_path / "private", seed=0
        )


def test_every_item_counts(split: Path, tmp_path: Path) -> None:
    labels = split / "private" / "dev"
    truth = {row["id"]: [row["label"]] for row in rows(labels / "labels.csv")}
    first, second, third, fourth, *_ = truth
    wrong = {"yes": "no", "no": "yes"}[truth[fourth][0]]
    given = truth | {first: truth[first] * 2, second: [], third: ["True"], fourth: [wrong]}
    lines = [(item, answer) for item, answers in given.items() for answer in answers]
    with (tmp_path / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("PassengerId", "Transported"), *lines, ("9999_01", "yes")])
    found = task_module(load_task(TASK), "verify").verify(tmp_path, labels)
    assert found["n_items"] == len(truth)
    assert found["n_answered"] == len(truth) - 3
    assert found["score"] == pytest.approx(1 - 4 / len(truth))
    metrics = found["metrics"]
    assert (metrics["n_duplicated"], metrics["n_missing"], metrics["n_unknown_answer"]) == (1, 1, 1)
    assert sum(count for *_, count in found["breakdown"]["confusions"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PassengerId,Transported\n\xff", "not UTF-8"), (b"id,label\n", "the header is")],
)
def test_a_submission_that_cannot_be_read_is_refused(
    split: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "submission.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        task_module(load_task(TASK), "verify").verify(tmp_path, split / "private" / "dev")


def test_a_link_to_the_labels_is_refused(split: Path, tmp_path: Path) -> None:
    labels = split / "private" / "dev"
    (tmp_path / "submission.csv").symlink_to(labels / "labels.csv")
    with pytest.raises(ValueError, match="not a plain file"):
        task_module(load_task(TASK), "verify").verify(tmp_path, labels)


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for section, values in sections.items():
        config[section].update(values)
    return config


def test_repair_fills_what_the_list_implies(harness: dict[str, ModuleType], split: Path) -> None:
    people = harness["passengers"].read_passengers(split / "public")
    settings = harness["features"].Repair(spending=True, planet=True, cabin=True)
    fixed = harness["features"].repair(people, settings)
    spent = np.nansum(people.spending, 1) > 0
    assert (fixed.asleep[spent & np.isnan(people.asleep)] == 0).all()
    assert not np.isnan(fixed.spending[people.asleep == 1]).any()
    assert (fixed.planet == "").sum() < (people.planet == "").sum()
    # Cells that were filled in the file stay.
    known = people.planet != ""
    np.testing.assert_array_equal(fixed.planet[known], people.planet[known])


def test_companions_are_the_others_of_the_group(harness: dict[str, ModuleType]) -> None:
    values, groups = np.array([1.0, 3.0, np.nan, 7.0]), np.array([1, 1, 1, 2])
    found = harness["features"]._mean_of_others(values, groups)
    np.testing.assert_array_equal(found, [3.0, 1.0, 2.0, np.nan])


@pytest.mark.parametrize("kind", ["logistic", "hist", "forest", "blend"])
def test_every_model_is_repeatable_and_better_than_a_constant(
    harness: dict[str, ModuleType], split: Path, kind: str
) -> None:
    config = changed(
        model={"kind": kind, "pairs": True, "bags": 2},
        hist={"rounds": 10},
        forest={"trees": 20},
        repair={"spending": True, "planet": True, "cabin": True},
        features=dict.fromkeys(CONFIG["features"], True),
    )
    agent = harness["target_agent"]
    people = harness["passengers"].read_passengers(split / "public")
    table = agent.make_table(people, config)
    chances = agent.predict(table, people.answers, config)
    np.testing.assert_array_equal(chances, agent.predict(table, people.answers, config))
    sides = [rows(split / "private" / side / "labels.csv") for side in ("dev", "test")]
    truth = {row["id"]: row["label"] == "yes" for side in sides for row in side}
    hits = [(chances[i] > 0.5) == truth[people.ids[i]] for i in people.items.tolist()]
    assert np.mean(hits) > 0.75


def test_no_feature_looks_at_the_answers(harness: dict[str, ModuleType], split: Path) -> None:
    config = changed(features=dict.fromkeys(CONFIG["features"], True))
    people = harness["passengers"].read_passengers(split / "public")
    other = replace(people, answers=~people.answers)
    agent = harness["target_agent"]
    before, after = agent.make_table(people, config), agent.make_table(other, config)
    np.testing.assert_array_equal(before.values, after.values)


def test_revealing_dev_changes_no_feature(harness: dict[str, ModuleType], split: Path) -> None:
    config = changed(features=dict.fromkeys(CONFIG["features"], True))
    tables = []
    for name in ("public", "revealed"):
        people = harness["passengers"].read_passengers(split / name)
        tables.append(harness["target_agent"].make_table(people, config).values[people.items])
    np.testing.assert_allclose(tables[0], tables[1])


def test_the_submission_and_the_trajectories_are_written(
    harness: dict[str, ModuleType], split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--dataset_dir", str(split / "revealed"), "--working_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["target_agent.py", *arguments])
    harness["target_agent"].main()
    items = [row["PassengerId"] for row in rows(split / "public" / "items.csv")]
    assert [row["PassengerId"] for row in rows(tmp_path / "submission.csv")] == items
    assert len(list((tmp_path / "agent_execution").iterdir())) == CONFIG["trajectories"]


def test_an_unknown_model_is_named(harness: dict[str, ModuleType], split: Path) -> None:
    config = changed(model={"kind": "oracle"})
    people = harness["passengers"].read_passengers(split / "public")
    table = harness["target_agent"].make_table(people, config)
    with pytest.raises(ValueError, match="'oracle' is none of"):
        harness["target_agent"].predict(table, people.answers, config)
